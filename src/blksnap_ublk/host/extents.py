# SPDX-License-Identifier: MIT
"""Where the bytes of a file lie: extents (FIEMAP) and holes."""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
from dataclasses import dataclass

_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP_SYNC = 1
_HEADER = struct.Struct("=QQIIII")  # start, length, flags, mapped extents, extent count, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_BATCH = 512


class ExtentFlags(enum.IntFlag, boundary=enum.KEEP):
    """The flags of FIEMAP that matter to somebody who writes into the extent."""

    LAST = 0x0001
    UNKNOWN = 0x0002
    DELALLOC = 0x0004
    ENCODED = 0x0008
    INLINE = 0x0200
    TAIL = 0x0400
    UNWRITTEN = 0x0800
    SHARED = 0x2000


@dataclass(frozen=True)
class Extent:
    """A run of a file: bytes `start` to `start + length` lie at byte `physical` of its device."""

    start: int
    physical: int
    length: int
    flags: ExtentFlags


def extents(descriptor: int, start: int, length: int) -> list[Extent] | None:
    """The extents of a byte range, dirty data written back first; None where the file system has no FIEMAP.

    The first and the last extent may reach beyond the range. Raises OSError.
    """
    found: list[Extent] = []
    position, end = start, start + length
    while position < end:
        buffer = bytearray(_HEADER.size + _BATCH * _EXTENT.size)
        _HEADER.pack_into(buffer, 0, position, end - position, _FIEMAP_SYNC, 0, _BATCH, 0)
        try:
            fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, buffer)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                return None
            raise
        count = _HEADER.unpack_from(buffer)[3]
        for index in range(count):
            logical, physical, size, flags = _EXTENT.unpack_from(buffer, _HEADER.size + index * _EXTENT.size)
            found.append(Extent(logical, physical, size, ExtentFlags(flags)))
        if count < _BATCH or found[-1].flags & ExtentFlags.LAST:
            break
        position = found[-1].start + found[-1].length
    return found


def holes(descriptor: int, start: int, length: int) -> list[tuple[int, int]]:
    """The parts, as (start, length) in bytes, of a range of a file that have no space of their own.

    Without FIEMAP, space that was allocated and never written counts as a hole. Raises OSError.
    """
    mapped = extents(descriptor, start, length)
    if mapped is None:
        return _sought_holes(descriptor, start, length)
    return gaps([(extent.start, extent.length) for extent in mapped], start, length)


def gaps(runs: list[tuple[int, int]], start: int, length: int) -> list[tuple[int, int]]:
    """What of `start … start + length` none of the (start, length) runs covers."""
    found = []
    position, end = start, start + length
    for begin, size in sorted(runs):
        if begin >= end:
            break
        if begin > position:
            found.append((position, begin - position))
        position = max(position, begin + size)
    if position < end:
        found.append((position, end - position))
    return found


def _sought_holes(descriptor: int, start: int, length: int) -> list[tuple[int, int]]:
    found = []
    end = start + length
    position = start
    size = os.fstat(descriptor).st_size
    while position < min(end, size):
        hole = os.lseek(descriptor, position, os.SEEK_HOLE)
        if hole >= min(end, size):
            break
        try:
            data = os.lseek(descriptor, hole, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end
        found.append((hole, min(data, end) - hole))
        position = data
    if end > size and not (found and sum(found[-1]) == end):
        found.append((max(size, start), end - max(size, start)))
    return found
