# SPDX-License-Identifier: MIT
"""A change bitmap in a file: set by the process that does the I/O, read here through the same pages.

Block b is bit b % 8 of byte b // 8, which is bit b % 64 of the little-endian 64-bit word b // 64.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.cbt import mapped_file
from blksnap_ublk.cbt.geometry import CHUNK_WORDS, Geometry


class Bitmap:
    """One bit for each tracking block. The mapping is read-only: Python never writes a live bitmap."""

    def __init__(self, path: Path, geometry: Geometry, *, longer: bool = False) -> None:
        """Map an existing file. Raises HistoryDamaged if it is not a bitmap of this geometry.

        `longer`: it may have been made ready for a larger one.
        """
        self.path = path
        self.geometry = geometry
        mapping = mapped_file.map_shared(path, geometry.bitmap_bytes, writable=False, longer=longer)
        words = np.frombuffer(mapping, dtype="<u8").reshape(-1, CHUNK_WORDS)
        self.rows: NDArray[np.uint64] = words[: geometry.chunks]
        """The live bits, uint64 of shape (chunks, CHUNK_WORDS), without a copy."""

    @classmethod
    def create(cls, path: Path, geometry: Geometry) -> Bitmap:
        """Make the file, all bits clear, all of it allocated. Raises OSError and leaves no file."""
        mapped_file.create(path, geometry.bitmap_bytes)
        try:
            return cls(path, geometry)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    @property
    def length(self) -> int:
        """Bytes of the file and of a mapping of it."""
        return self.geometry.bitmap_bytes

    def open(self) -> int:
        """A descriptor of the file for the process that sets the bits (O_RDWR, O_CLOEXEC); the caller closes it."""
        return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def touched(self) -> NDArray[np.bool_]:
        """Which chunks have a bit set at this moment: bool of shape (chunks,)."""
        touched: NDArray[np.bool_] = np.bitwise_or.reduce(self.rows, axis=1) != 0
        return touched

    def count(self) -> int:
        """Blocks of the device that are marked at this moment."""
        last = self.rows[-1] & self.geometry.tail_mask()
        return int(np.bitwise_count(self.rows[:-1]).sum(dtype=np.int64)) + int(np.bitwise_count(last).sum())
