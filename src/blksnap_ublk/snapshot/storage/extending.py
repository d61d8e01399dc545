# SPDX-License-Identifier: MIT
"""Files of a difference storage made longer by space of their own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

from blksnap_ublk.host.syscalls import fallocate

STEP = 128 << 20
"""Bytes allocated by one call: the file is locked meanwhile, and writes to it wait."""

SMALLEST = 4 << 20
"""Bytes of the smallest portion that is tried where there is no room for a larger one."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def extend(
    descriptor: int, end: int, wanted: int, multiple: int, guard: Callable[[], AbstractContextManager[None]]
) -> int:
    """Gives a file space from byte `end` on: `wanted` bytes, or where there is no room for them a half, a quarter …

    What is given, a multiple of `multiple`, and at least `SMALLEST` if so much is wanted. The file is as long then; it
    may have been longer before. Each system call is made within `guard()`. It may wait for a frozen file system.
    Raises OSError, and the file is as long as before then.
    """
    size = wanted // multiple * multiple
    if size <= 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    least = min(SMALLEST // multiple * multiple or multiple, size)
    while True:
        try:
            _allocate(descriptor, end, size, guard)
            return size
        except OSError as error:
            half = size // 2 // multiple * multiple
            if error.errno not in _NO_ROOM or half < least:
                raise
            size = half


def _allocate(descriptor: int, end: int, size: int, guard: Callable[[], AbstractContextManager[None]]) -> None:
    before = os.fstat(descriptor).st_size
    try:
        for start in range(end, end + size, STEP):
            with guard():
                fallocate(descriptor, 0, start, min(STEP, end + size - start))
    except OSError:
        with guard():
            os.ftruncate(descriptor, before)
        raise
