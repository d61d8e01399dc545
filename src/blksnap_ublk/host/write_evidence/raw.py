# SPDX-License-Identifier: MIT
"""Reading a device past the page cache, in bytes."""

from __future__ import annotations

import errno
import mmap
import os

_ALIGN = 4096
_PIECE_MAX = 1 << 20


class RawReader:
    """Reads of `descriptor`, which may be opened O_DIRECT; `start` is where the file system begins, in bytes."""

    def __init__(self, descriptor: int, start: int = 0) -> None:
        self._descriptor = descriptor
        self._start = start

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes, at most 1 MiB. Raises OSError; ENXIO beyond the end."""
        if not 0 < length <= _PIECE_MAX or offset < 0:
            raise OSError(errno.ENXIO, "not a place on the device")
        at = self._start + offset
        begin = at - at % _ALIGN
        end = -(-(at + length) // _ALIGN) * _ALIGN
        with mmap.mmap(-1, end - begin) as buffer:
            done = os.preadv(self._descriptor, [buffer], begin)
            if done < at + length - begin:
                raise OSError(errno.ENXIO, "beyond the end of the device")
            return buffer[at - begin : at - begin + length]
