# SPDX-License-Identifier: MIT
"""A layer: what changed in one interval, or in several that follow one another.

The history of a device is a list of layers, oldest first. A layer of one interval is the bitmap that was active in it;
a layer of several is a last-change array. "Changed in the intervals after n", asked of a layer as a whole, has an
exact answer for every n; asked up to an interval in its midst, it has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.cbt.bitmap import Bitmap
from blksnap_ublk.cbt.geometry import CHUNK_BLOCKS, CHUNK_WORDS
from blksnap_ublk.cbt.last_change import LastChangeArray

Chunks = NDArray[np.intp]
"""Chunk numbers, ascending."""


class IntervalLayer:
    """The interval that ended with one snapshot.

    Its bitmap is still written while that snapshot or the one before it is held: by writes to their images. So nothing
    of it is remembered here.
    """

    def __init__(self, number: int, bitmap: Bitmap) -> None:
        self.first = self.last = number
        self.bitmap = bitmap

    @property
    def path(self) -> Path:
        return self.bitmap.path

    @property
    def length(self) -> int:
        """Bytes of memory or file."""
        return self.bitmap.length

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The change numbers it tells apart, ascending."""
        return np.array([self.last], np.int64)

    def touched(self, since: int) -> NDArray[np.bool_]:
        """Which chunks may have changed after `since`, which is below `last`: bool of shape (chunks,)."""
        return self.bitmap.touched()

    def add_changed(self, since: int, chunks: Chunks, places: Chunks, words: NDArray[np.uint64]) -> None:
        """Set in `words`, shape (len(chunks), CHUNK_WORDS), the bits of the blocks changed after `since` < `last`.

        `places` are the positions in `chunks` of those that `touched` told of.
        """
        words[places] |= self.bitmap.rows[chunks[places]]

    def indices(self, chunks: Chunks, of_number: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """The blocks of `chunks` as `of_number[position in self.numbers]`, 0 where nothing changed."""
        bits = np.unpackbits(self.bitmap.rows[chunks].view(np.uint8), axis=1, bitorder="little")
        indices: NDArray[np.uint16] = bits * of_number[0]
        return indices


@dataclass(frozen=True, eq=False)
class ArrayLayer:
    """The intervals `first` to `last`; index i in `array` stands for `numbers[i - 1]`.

    While younger layers are being folded into `array`, indices of theirs stand in it already and `numbers` goes
    beyond `last`. That alters no answer: each change they tell of, their own layers tell of too, and nobody can ask
    up to `last` any more.
    """

    first: int
    last: int
    array: LastChangeArray
    numbers: NDArray[np.int64]

    @property
    def path(self) -> Path:
        return self.array.path

    @property
    def length(self) -> int:
        """Bytes of memory or file."""
        return self.array.length

    def touched(self, since: int) -> NDArray[np.bool_]:
        """Which chunks may have changed after `since`, which is below `last`: bool of shape (chunks,)."""
        return self.array.has_row() & (self.array.newest > self._index(since))

    def add_changed(self, since: int, chunks: Chunks, places: Chunks, words: NDArray[np.uint64]) -> None:
        """Set in `words`, shape (len(chunks), CHUNK_WORDS), the bits of the blocks changed after `since` < `last`.

        `places` are the positions in `chunks` of those that `touched` told of.
        """
        values = self.array.rows[self.array.row_of[chunks[places]] - 1]
        changed = np.packbits(values > self._index(since), axis=1, bitorder="little")
        words[places] |= changed.view("<u8").reshape(-1, CHUNK_WORDS)

    def indices(self, chunks: Chunks, of_number: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """The blocks of `chunks` as `of_number[position in self.numbers]`, 0 where nothing changed."""
        translate = np.concatenate((np.zeros(1, np.uint16), of_number))
        result = np.zeros((len(chunks), CHUNK_BLOCKS), np.uint16)
        present = np.flatnonzero(self.array.has_row()[chunks])
        result[present] = translate[self.array.rows[self.array.row_of[chunks[present]] - 1]]
        return result

    def _index(self, number: int) -> np.uint16:
        """The highest index that stands for `number` or less."""
        return np.uint16(np.searchsorted(self.numbers, number, side="right"))


Layer = IntervalLayer | ArrayLayer
