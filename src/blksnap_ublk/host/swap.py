# SPDX-License-Identifier: MIT
"""Swap areas in use."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk.host.mounts import unescape
from blksnap_ublk.host.number import DeviceNumber


@dataclass(frozen=True)
class SwapArea:
    """A device (`inode` None, `device` its own number) or a file (`device` that of its file system)."""

    path: str
    device: DeviceNumber
    inode: int | None


def swap_areas() -> list[SwapArea]:
    """The swap areas whose path can be seen from this process."""
    found = []
    for line in Path("/proc/swaps").read_text(errors="surrogateescape").splitlines()[1:]:
        path = unescape(line.split()[0])
        try:
            status = os.stat(path)
        except OSError:
            continue
        if stat.S_ISBLK(status.st_mode):
            found.append(SwapArea(path, DeviceNumber.of(status.st_rdev), None))
        else:
            found.append(SwapArea(path, DeviceNumber.of(status.st_dev), status.st_ino))
    return found
