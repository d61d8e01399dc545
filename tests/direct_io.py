# SPDX-License-Identifier: MIT
"""Reads and writes of a disk past the page cache, at any multiple of its logical block."""

from __future__ import annotations

import mmap
import os


def read_at(path: str, start: int, length: int) -> bytes:
    """Exactly these bytes. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, length) as buffer:
            got = os.preadv(descriptor, [buffer], start)
            assert got == length, f"{path}: {got} of {length} bytes at {start}"
            return buffer[:]
    finally:
        os.close(descriptor)


def write_at(path: str, start: int, data: bytes, flags: int = 0) -> None:
    """One write of all these bytes; `flags` for open, such as O_DSYNC. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | flags)
    try:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            done = os.pwritev(descriptor, [buffer], start)
            assert done == len(data), f"{path}: {done} of {len(data)} bytes at {start}"
    finally:
        os.close(descriptor)


def errno_of_read(path: str, start: int, length: int) -> int:
    """The errno that reading ends with, 0 when it does not fail."""
    try:
        read_at(path, start, length)
    except OSError as error:
        return error.errno or 0
    return 0


def errno_of_write(path: str, start: int, data: bytes) -> int:
    """The errno that writing ends with, 0 when it does not fail."""
    try:
        write_at(path, start, data)
    except OSError as error:
        return error.errno or 0
    return 0
