# SPDX-License-Identifier: MIT
"""The exclusive claim of a block device."""

from __future__ import annotations

import errno
import os

from blksnap_ublk.errors import Failed, NotFound, errno_symbol, from_os_error
from blksnap_ublk.host import blockdev, holders, sysfs
from blksnap_ublk.host.number import DeviceNumber

_GONE = {errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM}


def open_exclusive(path: str) -> int:
    """Claims a block device: a descriptor opened `O_RDWR | O_EXCL | O_DIRECT | O_CLOEXEC`, which the caller closes.

    Raises Busy naming who has it, NotFound, UsageError (not a block device), Failed.
    """
    number = blockdev.device_number(path)
    if sysfs.integer(sysfs.directory(number), "ro"):  # such a device can be opened for writing; its writes fail
        raise Failed("the device is read-only", subject=path, errno="EROFS", advice="make it writable first")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise holders.busy_error(path, number) from None
        if error.errno in _GONE:
            raise NotFound("no such device", subject=path, errno=errno_symbol(error.errno)) from None
        raise from_os_error(error, subject=path) from None
    if DeviceNumber.of(os.fstat(descriptor).st_rdev) != number:
        os.close(descriptor)
        raise Failed("became another device while it was opened", subject=path, advice="try again")
    return descriptor
