# SPDX-License-Identifier: MIT
"""The bitmap of changed blocks of an interval between two switches, and what is known of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.unit.sim.shared import shared


class Interval:
    """`may`: blocks that somebody has touched. `must`: blocks that are known to have changed."""

    def __init__(self, size: int, tracking_block: int) -> None:
        self.tracking_block = tracking_block
        self.blocks = (size + tracking_block - 1) // tracking_block
        self.bitmap: Any = self.new_bitmap()
        self.may = np.zeros(self.blocks, dtype=bool)
        self.must = np.zeros(self.blocks, dtype=bool)

    def new_bitmap(self) -> Any:
        """A bitmap of whole pages, zeroed."""
        return shared((self.blocks + 32767) // 32768 * 4096)

    def touch(self, start: int, length: int) -> None:
        """Blocks that it may have from now on; bytes."""
        self.may[start // self.tracking_block : (start + length - 1) // self.tracking_block + 1] = True

    def changed(self, byte: int) -> None:
        """What is there has changed: its block has been marked before."""
        block = byte // self.tracking_block
        self.must[block] = True
        assert self.bitmap[block // 8] >> (block % 8) & 1, f"block {block} has changed before it is marked"

    def check(self) -> None:
        """Every block that has changed is marked, and none that nobody touched."""
        marked = np.unpackbits(self.bitmap, bitorder="little")[: self.blocks].astype(bool)
        missed = np.flatnonzero(self.must & ~marked)
        assert not len(missed), f"tracking blocks {missed} changed and are not marked"
        invented = np.flatnonzero(marked & ~self.may)
        assert not len(invented), f"tracking blocks {invented} are marked and nobody touched them"
