# SPDX-License-Identifier: MIT
"""What layers answer: the blocks changed after a number, as bits and as byte ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.cbt.geometry import CHUNK_BLOCKS, CHUNK_WORDS, Geometry
from blksnap_ublk.cbt.layer import Chunks, Layer

_BATCH = 256

Words = NDArray[np.uint64]


def changed_words(layers: Sequence[Layer], since: int, geometry: Geometry) -> Iterator[tuple[Chunks, Words]]:
    """The blocks that any layer says changed after `since`, a batch of chunks at a time, ascending.

    Yields chunk numbers and their bits, uint64 of shape (len(chunks), CHUNK_WORDS). Chunks in which nothing changed
    are left out, mostly unread.
    """
    later = [(layer, layer.touched(since)) for layer in layers if layer.last > since]
    if not later:
        return
    every = np.flatnonzero(np.logical_or.reduce([touched for _, touched in later]))
    for part in range(0, len(every), _BATCH):
        chunks = every[part : part + _BATCH]
        words = np.zeros((len(chunks), CHUNK_WORDS), np.uint64)
        for layer, touched in later:
            places = np.flatnonzero(touched[chunks])
            if len(places):
                layer.add_changed(since, chunks, places, words)
        if chunks[-1] == geometry.chunks - 1:
            words[-1] &= geometry.tail_mask()
        yield chunks, words


def block_ranges(chunks: Chunks, words: Words) -> NDArray[np.int64]:
    """The runs of set bits as blocks, shape (n, 2): first, and first after it."""
    flat = words.ravel()
    where = np.flatnonzero(flat)
    some = flat[where]
    first_block = chunks[where // CHUNK_WORDS] * CHUNK_BLOCKS + where % CHUNK_WORDS * 64
    follows = (np.diff(first_block) == 64).astype(np.uint64)
    bit_before = some << np.uint64(1)
    bit_before[1:] |= (some[:-1] >> np.uint64(63)) * follows
    bit_after = some >> np.uint64(1)
    bit_after[:-1] |= (some[1:] * follows) << np.uint64(63)
    starts = _positions(some & ~bit_before, first_block)
    lasts = _positions(some & ~bit_after, first_block)
    return np.stack((starts, lasts + 1), axis=1)


def merged(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Ranges of blocks, ascending, as one array of shape (n, 2) in which neighbours that touch are joined."""
    if not parts:
        return np.empty((0, 2), np.int64)
    ranges = np.concatenate(parts)
    apart = ranges[1:, 0] != ranges[:-1, 1]
    starts = ranges[np.concatenate(([True], apart)), 0] if len(ranges) else ranges[:, 0]
    ends = ranges[np.concatenate((apart, [True])), 1] if len(ranges) else ranges[:, 1]
    return np.stack((starts, ends), axis=1)


def byte_ranges(layers: Sequence[Layer], since: int, geometry: Geometry) -> NDArray[np.int64]:
    """What changed after `since` as (byte start, byte length), shape (n, 2), ascending, neighbours joined.

    The last block is clipped to the size of the device.
    """
    ranges = merged([block_ranges(chunks, words) for chunks, words in changed_words(layers, since, geometry)])
    ranges *= geometry.tracking_block
    np.minimum(ranges, geometry.size, out=ranges)
    ranges[:, 1] -= ranges[:, 0]
    return ranges


def changed_blocks(layers: Sequence[Layer], since: int, geometry: Geometry) -> NDArray[np.bool_]:
    """What changed after `since`: bool of shape (blocks,)."""
    changed = np.zeros((geometry.chunks, CHUNK_BLOCKS), np.bool_)
    for chunks, words in changed_words(layers, since, geometry):
        changed[chunks] = np.unpackbits(words.astype("<u8").view(np.uint8), axis=1, bitorder="little")
    return changed.reshape(-1)[: geometry.blocks]


def last_numbers(layers: Sequence[Layer], unchanged: int, geometry: Geometry) -> NDArray[np.uint32]:
    """For each block the number of the interval it was last changed in, else `unchanged`: shape (blocks,)."""
    last = np.full((geometry.chunks, CHUNK_BLOCKS), unchanged, np.uint32)
    for layer in layers:
        positions = np.arange(1, len(layer.numbers) + 1, dtype=np.uint16)
        numbers = np.concatenate((np.zeros(1, np.uint32), layer.numbers.astype(np.uint32)))
        changed = np.flatnonzero(layer.touched(0))
        for part in range(0, len(changed), _BATCH):
            chunks = changed[part : part + _BATCH]
            indices = layer.indices(chunks, positions)
            some = last[chunks]
            np.copyto(some, numbers[indices], where=indices != 0)
            last[chunks] = some
    return last.reshape(-1)[: geometry.blocks]


def _positions(words: Words, first_block: NDArray[np.int64]) -> NDArray[np.int64]:
    """The blocks of all set bits, given the block of the first bit of each word."""
    where = np.flatnonzero(words)
    bits = np.unpackbits(words[where].astype("<u8").view(np.uint8), bitorder="little")
    # Of truth values in one row: several times as fast as of numbers in two dimensions.
    at = np.flatnonzero(bits.view(np.bool_))
    positions: NDArray[np.int64] = first_block[where[at >> 6]] + (at & 63)
    return positions
