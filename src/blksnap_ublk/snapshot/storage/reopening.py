# SPDX-License-Identifier: MIT
"""The files and block devices of a storage opened again, when all processes that held them have died."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from blksnap_ublk.errors import Busy, Failed
from blksnap_ublk.host.claim import open_exclusive
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.storage.areas import Identity
from blksnap_ublk.snapshot.storage.files import open_locked


def reopen(path: str, identity: Identity, patience: float) -> int:
    """A descriptor of the file or block device that `path` led to. Raises BlksnapError, OSError.

    A dead process holds its claim until its last I/O has ended: that is waited for, `patience` seconds.
    """
    if identity.inode:
        return when_free(lambda: open_locked(path, identity), patience)
    return reclaim(path, identity.device, patience)


def reclaim(path: str, number: DeviceNumber, patience: float) -> int:
    """The same for a block device of that number."""
    descriptor = when_free(lambda: open_exclusive(path), patience)
    if DeviceNumber.of(os.fstat(descriptor).st_rdev) != number:
        os.close(descriptor)
        raise Failed(f"is another device now, not {number.major}:{number.minor}", subject=path, errno="ENXIO")
    return descriptor


def when_free(opener: Callable[[], int], patience: float) -> int:
    """What `opener` gives, called again while it raises Busy."""
    end = time.monotonic() + patience
    while True:
        try:
            return opener()
        except Busy:
            if time.monotonic() > end:
                raise
        time.sleep(0.05)
