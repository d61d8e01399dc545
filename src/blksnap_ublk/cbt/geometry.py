# SPDX-License-Identifier: MIT
"""How a device is divided: bytes, tracking blocks, and chunks of blocks, the step of the summary level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAGE = 4096
CHUNK_BLOCKS = 4096
CHUNK_WORDS = CHUNK_BLOCKS // 64

TRACKING_BLOCK_MIN = 4 << 10
TRACKING_BLOCK_MAX = 64 << 20
TRACKING_BLOCK_DEFAULT = 64 << 10


def page_ceil(length: int) -> int:
    """`length` in bytes, rounded up to whole pages."""
    return -(-length // PAGE) * PAGE


@dataclass(frozen=True, slots=True)
class Geometry:
    """A device of `size` bytes in tracking blocks of `tracking_block` bytes. Raises ValueError if it cannot be."""

    size: int
    tracking_block: int = TRACKING_BLOCK_DEFAULT

    def __post_init__(self) -> None:
        if not 0 < self.size < 1 << 63:
            raise ValueError(f"a device of {self.size} bytes cannot be tracked")
        block = self.tracking_block
        if not TRACKING_BLOCK_MIN <= block <= TRACKING_BLOCK_MAX or block & (block - 1):
            raise ValueError(f"tracking block of {block} bytes: it must be a power of two from 4 KiB to 64 MiB")

    @property
    def blocks(self) -> int:
        """Tracking blocks; the last may be short."""
        return -(-self.size // self.tracking_block)

    @property
    def chunks(self) -> int:
        """Chunks of CHUNK_BLOCKS blocks; the last may be short."""
        return -(-self.blocks // CHUNK_BLOCKS)

    @property
    def bitmap_bytes(self) -> int:
        """Length of a bitmap file: one bit for each block, whole pages."""
        return page_ceil(-(-self.blocks // 8))

    def tail_mask(self) -> NDArray[np.uint64]:
        """The bits of the last chunk that stand for blocks of the device: uint64 of shape (CHUNK_WORDS,)."""
        blocks = self.blocks - (self.chunks - 1) * CHUNK_BLOCKS
        bits = np.zeros(CHUNK_BLOCKS, np.uint8)
        bits[:blocks] = 1
        return np.packbits(bits, bitorder="little").view("<u8")
