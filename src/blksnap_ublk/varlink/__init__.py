# SPDX-License-Identifier: MIT
"""The varlink protocol (varlink.org): JSON messages that end in NUL, over a stream socket.

Knows no interface but `org.varlink.service`. `server` serves interfaces on asyncio, `connection` calls them from
ordinary code without asyncio, `wire` is what both agree on.
"""
