# SPDX-License-Identifier: MIT
"""Overwriting what a difference storage held, so that nobody reads it from the file or the device afterwards.

Zeroes are written where the data lies. What a device keeps beside that, as spare blocks of an SSD, is out of reach;
it is told to forget the space where it takes discards.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress

_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_RANGE = struct.Struct("=QQ")
_PIECE = 1 << 20  # bytes that are written at once
_SLICE = 128 << 20  # bytes that one call to the kernel is about, so that it returns in time for signals
_NOT_TAKEN = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL)


def wipe(descriptor: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Overwrites byte ranges, (start, length) each, of a file or a block device with zeroes, durably.

    Starts and lengths are multiples of what O_DIRECT asks for, and lie within the file; files are those that are
    written in place. Returns when all has reached the device. Raises OSError; what was not wiped is unknown then.
    """
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        _wipe_device(descriptor, ranges)
    else:
        _write_zeroes(descriptor, ranges)
        os.fsync(descriptor)


def _wipe_device(descriptor: int, ranges: Sequence[tuple[int, int]]) -> None:
    for start, length in _cut(ranges, _SLICE):
        try:
            # The device zeroes it by itself where it can; otherwise the kernel sends zeroes.
            fcntl.ioctl(descriptor, _BLKZEROOUT, _RANGE.pack(start, length))
        except OSError as error:
            if error.errno not in _NOT_TAKEN:
                raise
            _write_zeroes(descriptor, [(start, length)])
    os.fsync(descriptor)
    # Only then: a discard alone promises nothing about what is read afterwards.
    with suppress(OSError):
        for start, length in _cut(ranges, _SLICE):
            fcntl.ioctl(descriptor, _BLKDISCARD, _RANGE.pack(start, length))


def _write_zeroes(descriptor: int, ranges: Sequence[tuple[int, int]]) -> None:
    with mmap.mmap(-1, _PIECE) as zeroes, memoryview(zeroes) as view:
        for start, length in _cut(ranges, _PIECE):
            done = 0
            while done < length:
                with view[: length - done] as piece:
                    done += os.pwrite(descriptor, piece, start + done)


def _cut(ranges: Sequence[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    for start, length in ranges:
        for begin in range(start, start + length, most):
            yield begin, min(most, start + length - begin)
