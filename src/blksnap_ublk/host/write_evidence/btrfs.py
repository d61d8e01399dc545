# SPDX-License-Identifier: MIT
"""btrfs: the superblock, which each transaction writes with another generation and checksum."""

from __future__ import annotations

from blksnap_ublk.host.write_evidence.found import Found
from blksnap_ublk.host.write_evidence.raw import RawReader

_SUPERBLOCK, _LENGTH = 64 << 10, 4096
_MAGIC = b"_BHRfS_M"


def look(device: RawReader) -> Found | None:
    """None where there is no such file system. Raises OSError."""
    block = device.read(_SUPERBLOCK, _LENGTH)
    if block[64:72] != _MAGIC:
        return None
    if any(block[96:104]):  # the root of a tree of what was synced since the last transaction
        return Found("btrfs", None, "its file system was not cleanly unmounted")
    return Found("btrfs", block, None)
