# SPDX-License-Identifier: MIT
"""Which bytes of a filtered device hold a file of a file system on it."""

import os
import stat

from blksnap_ublk.errors import Failed, Unsupported, UsageError, from_os_error
from blksnap_ublk.forms import Range
from blksnap_ublk.host.extents import ExtentFlags, extents

SECTOR = 512
_NOWHERE = ExtentFlags.UNKNOWN | ExtentFlags.DELALLOC | ExtentFlags.ENCODED


def file_ranges(path: str, filtered_device: str) -> list[Range]:
    """The ranges of `filtered_device` (a path) that the regular file `path` occupies.

    The file system must lie directly on the device or on a partition of it. Raises UsageError, Unsupported, Failed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError("not a regular file", subject=path)
            offset = _offset_on(filtered_device, status.st_dev, path)
            found = extents(descriptor, 0, status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise from_os_error(error, subject=path) from error
    if found is None:
        raise Unsupported("its file system does not tell where files lie", subject=path, advice="use --range")
    if any(extent.flags & _NOWHERE for extent in found):
        raise Failed("parts of it have no known place on the device", subject=path, advice="use --range")
    return [Range(start=offset + extent.physical, length=extent.length) for extent in found]


def _offset_on(filtered_device: str, filesystem: int, path: str) -> int:
    """Where the device number `filesystem` begins on the filtered device, in bytes. Raises Unsupported, OSError."""
    device = os.stat(filtered_device).st_rdev
    if filesystem == device:
        return 0
    partition = f"/sys/dev/block/{os.major(filesystem)}:{os.minor(filesystem)}"
    if os.path.exists(f"{partition}/partition"):
        with open(f"{partition}/../dev") as disk:
            is_its_disk = disk.read().strip() == f"{os.major(device)}:{os.minor(device)}"
        if is_its_disk:
            with open(f"{partition}/start") as start:
                return int(start.read()) * SECTOR
    raise Unsupported(
        f"its file system does not lie directly on {filtered_device} or a partition of it",
        subject=path,
        advice="use --range",
    )
