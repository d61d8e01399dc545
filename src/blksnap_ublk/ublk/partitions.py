# SPDX-License-Identifier: MIT
"""The partitions that the kernel shows on the disk of a device: looked for on demand, or taken away.

Both open the disk, and looking for them reads from it: not to be called in the process that serves the device. `helper`
has a process for that.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import time
from pathlib import Path

from blksnap_ublk.ublk.device_info import block_path

_BLKPG = 0x1269
_BLKRRPART = 0x125F
_DELETE = 2
_PARTITION = struct.Struct("=qqi64s64s4x")  # struct blkpg_partition: start, length, number, two names
_ARGUMENT = struct.Struct("@iiiP")  # struct blkpg_ioctl_arg: operation, flags, length, address
_PASSING = 1.0  # seconds that somebody may have the disk or a partition open in passing, as udev does


def shown(device_id: int) -> list[int]:
    """The numbers of the partitions that have nodes."""
    return sorted(int(path.read_text()) for path in Path(f"/sys/block/ublkb{device_id}").glob("*/partition"))


def look(device_id: int) -> None:
    """Lets the kernel read the partition table; the nodes exist on return. Raises OSError."""
    _ioctl(device_id, _BLKRRPART, b"")


def hide(device_id: int) -> None:
    """Takes the nodes of all partitions away; what is on the disk stays. Raises OSError."""
    for number in shown(device_id):
        partition = ctypes.create_string_buffer(_PARTITION.pack(0, 0, number, b"", b""), _PARTITION.size)
        _ioctl(device_id, _BLKPG, _ARGUMENT.pack(_DELETE, 0, _PARTITION.size, ctypes.addressof(partition)))


def _ioctl(device_id: int, number: int, argument: bytes) -> None:
    descriptor = os.open(block_path(device_id), os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _PASSING
        while True:
            try:
                fcntl.ioctl(descriptor, number, argument)
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= end:
                    raise
            time.sleep(0.02)
    finally:
        os.close(descriptor)
