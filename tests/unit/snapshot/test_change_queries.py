# SPDX-License-Identifier: MIT
"""How many blocks a list of ranges covers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.snapshot.change_queries import joined_length

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)))


@given(RANGES)
def test_blocks_named_twice_count_once(ranges: list[tuple[int, int]]) -> None:
    covered = {block for start, length in ranges for block in range(start, start + length)}
    starts = np.array([start for start, _ in ranges], np.int64)
    ends = np.array([start + length for start, length in ranges], np.int64)
    assert joined_length(starts, ends) == len(covered)
