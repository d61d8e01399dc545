# SPDX-License-Identifier: MIT
"""Files that are mapped: made without holes, mapped shared, checked before use.

A hole of a tmpfs is allocated by the first touch, even by a read, and kills the process (SIGBUS) if the tmpfs is
full. So a file gets all its room when it is made, where running out of it is an ordinary error.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

from blksnap_ublk.cbt.errors import HistoryDamaged

_ZEROES = bytes(1 << 20)


def create(path: Path, length: int) -> None:
    """Make a file of `length` zero bytes, all of it allocated and written. Raises OSError and leaves no file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, length)
        zeroes = memoryview(_ZEROES)
        offset = 0
        while offset < length:
            offset += os.pwrite(descriptor, zeroes[: length - offset], offset)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def extend(path: Path, old: int, new: int) -> None:
    """Grow a file from `old` to `new` bytes, allocated; one that is longer is left alone.

    Raises OSError and leaves the length as it was.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size >= new:
            return
        os.posix_fallocate(descriptor, old, new - old)
    except OSError:
        os.ftruncate(descriptor, old)
        raise
    finally:
        os.close(descriptor)


def shorten(path: Path, length: int) -> None:
    """Cut a file back to `length` bytes, where it is longer. Nobody has mapped more of it. Raises OSError."""
    if path.stat().st_size > length:
        os.truncate(path, length)


def map_shared(path: Path, length: int | None, *, writable: bool, longer: bool = False) -> mmap.mmap:
    """Map a file of `length` bytes (None: any), or so much of one that may be `longer`.

    Raises HistoryDamaged if it is missing, no regular file, or of another length.
    """
    descriptor = open_regular(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        found = os.fstat(descriptor).st_size
        if found == 0 or (length is not None and (found < length or (found > length and not longer))):
            raise HistoryDamaged(f"{path}: {found} bytes long, expected {length or 'more'}")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(descriptor, length or found, mmap.MAP_SHARED, protection)
    finally:
        os.close(descriptor)


def open_regular(path: Path, access: int) -> int:
    """A descriptor of a regular file. Raises HistoryDamaged, at once, if it is missing or anything else."""
    try:
        descriptor = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise HistoryDamaged(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise HistoryDamaged(f"{path}: not a regular file")
    return descriptor
