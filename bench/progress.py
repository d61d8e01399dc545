# SPDX-License-Identifier: MIT
"""Telling what is being measured, and how long it has taken so far."""

from __future__ import annotations

import sys
import time

_began = time.monotonic()


def say(what: str) -> None:
    """A line on stderr."""
    print(f"bench: {time.monotonic() - _began:4.0f} s: {what}", file=sys.stderr, flush=True)
