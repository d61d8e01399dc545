# SPDX-License-Identifier: MIT
"""Writing back and dropping what the kernel has cached of a block device."""

from __future__ import annotations

import fcntl
import os

from blksnap_ublk.errors import from_os_error
from blksnap_ublk.host import blockdev
from blksnap_ublk.host.number import DeviceNumber

_BLKFLSBUF = 0x1261


def flush_disk(number: DeviceNumber) -> list[str]:
    """Writes back and drops the cached pages of a device, of its partitions, and of the disk that it is part of.

    Each node has a page cache of its own: flushing the disk alone leaves stale pages of open partition nodes. May wait
    for the device as long as that takes. Returns the nodes flushed; raises NotFound, Failed.
    """
    numbers = dict.fromkeys([*blockdev.partitions(number), number, blockdev.disk_of(number)])
    nodes = [blockdev.node_path(each) for each in numbers]
    for node in nodes:
        try:
            descriptor = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)  # BLKFLSBUF writes back too, but keeps the errors to itself
                fcntl.ioctl(descriptor, _BLKFLSBUF, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise from_os_error(error, subject=node) from None
    return nodes
