# SPDX-License-Identifier: MIT
"""Reading block devices past the page cache: hashes, copies, comparisons."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PIECE = 1 << 20


def sha256(device: str, size: int) -> str:
    """The hash of all of a device, read from the device itself."""
    digest = hashlib.sha256()
    for _, data in _pieces(device, [(0, size)]):
        digest.update(data)
    return digest.hexdigest()


def full_copy(device: str, size: int, copy: Path) -> None:
    """A copy in a file; blocks of zeroes become holes."""
    with copy.open("wb") as file:
        file.truncate(size)
        for offset, data in _pieces(device, [(0, size)]):
            if data.count(0) != len(data):
                os.pwrite(file.fileno(), data, offset)


def apply(device: str, ranges: Iterable[tuple[int, int]], copy: Path) -> int:
    """Copies just these ranges (start, length) into a copy; how many bytes that was."""
    done = 0
    with copy.open("r+b") as file:
        for offset, data in _pieces(device, ranges):
            os.pwrite(file.fileno(), data, offset)
            done += len(data)
    return done


def first_difference(device: str, size: int, copy: Path) -> int | None:
    """The offset of the first piece in which a device and a copy differ; None when they are equal."""
    with copy.open("rb") as file:
        for offset, data in _pieces(device, [(0, size)]):
            if os.pread(file.fileno(), len(data), offset) != data:
                return offset
    return None


def read_error(device: str, size: int) -> str | None:
    """The name of the error that reading a device ends with; None when all of it can be read."""
    try:
        for _ in _pieces(device, [(0, size)]):
            pass
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return None


def _pieces(device: str, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    with _direct(device) as descriptor, mmap.mmap(-1, PIECE) as buffer, memoryview(buffer) as view:
        for start, length in ranges:
            for offset in range(start, start + length, PIECE):
                wanted = min(PIECE, start + length - offset)
                with view[:wanted] as piece:
                    got = os.preadv(descriptor, [piece], offset)
                    if got != wanted:
                        raise OSError(errno.EIO, f"{device}: {got} of {wanted} bytes at {offset}")
                    yield offset, bytes(piece)


@contextmanager
def _direct(device: str) -> Iterator[int]:
    descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
