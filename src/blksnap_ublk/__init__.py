# SPDX-License-Identifier: MIT
"""Snapshots and change tracking for block devices, in user space, on ublk.

`connect()` talks to the daemon; `blksnap_ublk.ublk` is the framework for block devices of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blksnap_ublk.client import Client as Client
    from blksnap_ublk.client import connect as connect

__version__ = "0.1.0"
__all__ = ["Client", "connect"]


def __getattr__(name: str) -> Any:
    # The client is imported on first use: the io process and the framework live without it.
    if name in __all__:
        from blksnap_ublk import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
