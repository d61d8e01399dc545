# SPDX-License-Identifier: MIT
"""A file that is allocated ahead, so that a small file can be written where the file system has become full."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_LEAST = 64 << 10
_ZEROES = bytes(64 << 10)


class SpareFile:
    """Room set aside at `path`, in the directory that files are to be written in. Not for several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._length = 0
        with suppress(OSError):
            self._length = path.stat().st_blocks * 512
        with suppress(OSError):
            self.ensure(_LEAST)

    def ensure(self, length: int) -> None:
        """Sets aside `length` bytes or more. Raises OSError; what was there stays then."""
        wanted = max(_LEAST, length)
        if self._length >= wanted:
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            done = 0
            while done < wanted:
                done += os.pwrite(descriptor, _ZEROES[: wanted - done], done)
        finally:
            self._length = os.fstat(descriptor).st_blocks * 512
            os.close(descriptor)

    def become(self, path: Path, text: bytes) -> bool:
        """Makes the file at `path` with these contents out of what is set aside; False when that is too little."""
        if len(text) > self._length:
            return False
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(text):
                done += os.pwrite(descriptor, text[done:], done)
            os.ftruncate(descriptor, len(text))
        finally:
            os.close(descriptor)
        os.rename(self._path, path)
        self._length = 0
        return True
