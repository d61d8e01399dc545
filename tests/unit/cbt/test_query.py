# SPDX-License-Identifier: MIT
"""Bits become ranges and ranges bits again."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blksnap_ublk.cbt.geometry import CHUNK_BLOCKS, CHUNK_WORDS, Geometry
from blksnap_ublk.cbt.query import block_ranges, merged

CHUNKS = 5
BLOCKS = CHUNKS * CHUNK_BLOCKS
AT_WORD_EDGES = st.builds(
    lambda word, shift: 64 * word + shift, st.integers(0, BLOCKS // 64 - 1), st.sampled_from([0, 63])
)
FIRST = AT_WORD_EDGES | st.integers(0, BLOCKS - 1)
RANGES = st.lists(st.tuples(FIRST, st.sampled_from([1, 2, 63, 64, 65, 4096, 9000])))


@settings(deadline=None)
@given(RANGES, st.integers(0, 2**CHUNKS - 1), st.integers(1, CHUNKS))
def test_ranges_are_the_bits(drawn: list[tuple[int, int]], left_out: int, batch: int) -> None:
    """Chunks in any batches, with clear ones left out or not, give the maximal runs of set bits."""
    bits = np.zeros((CHUNKS, CHUNK_BLOCKS), np.bool_)
    for first, length in drawn:
        bits.reshape(-1)[first : first + length] = True
    kept = np.array([bits[chunk].any() or not left_out >> chunk & 1 for chunk in range(CHUNKS)])
    words = np.packbits(bits, axis=1, bitorder="little").view("<u8")
    chunks = np.flatnonzero(kept)
    parts = [chunks[at : at + batch] for at in range(0, len(chunks), batch)]
    ranges = merged([block_ranges(part, words[part]) for part in parts])
    again = np.zeros(BLOCKS, np.bool_)
    for first, end in ranges:
        again[first:end] = True
    assert np.array_equal(again, bits.reshape(-1))
    assert (ranges[:, 0] < ranges[:, 1]).all()
    assert (ranges[1:, 0] > ranges[:-1, 1]).all(), "neighbours are not joined"


@settings(deadline=None)
@given(st.binary(min_size=8 * CHUNK_WORDS, max_size=8 * CHUNK_WORDS))
def test_arbitrary_words(content: bytes) -> None:
    words = np.frombuffer(content, "<u8").reshape(1, CHUNK_WORDS)
    ranges = block_ranges(np.array([3]), words) - 3 * CHUNK_BLOCKS
    value = sum((1 << int(end)) - (1 << int(first)) for first, end in ranges)
    assert value == int.from_bytes(content, "little")


@settings(deadline=None)
@given(st.integers(1, 3 * CHUNK_BLOCKS))
def test_tail_mask_covers_the_blocks_of_the_device(blocks: int) -> None:
    geometry = Geometry(blocks * 4096 - 1, 4096)
    mask = geometry.tail_mask()
    assert int(np.bitwise_count(mask).sum()) == blocks - (geometry.chunks - 1) * CHUNK_BLOCKS
    assert geometry.blocks == blocks
    assert len(block_ranges(np.array([0]), mask.reshape(1, -1))) == 1
