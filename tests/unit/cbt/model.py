# SPDX-License-Identifier: MIT
"""The promise in its plainest form, to compare a history with: one set of changed blocks for each interval."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from blksnap_ublk.cbt import Bitmap, Changes, Cursor, History

DATA_FILES = ("bitmap.", "array.", "history.")


def mark(bitmap: Bitmap, blocks: Iterable[int]) -> None:
    """Set bits as the process that does the I/O does: through a writable mapping of its own."""
    descriptor = bitmap.open()
    try:
        with mmap.mmap(descriptor, bitmap.length) as mapping:
            for block in blocks:
                mapping[block // 8] |= 1 << block % 8
    finally:
        os.close(descriptor)


def blocks_of(changes: Changes, size: int) -> set[int]:
    """The blocks of an answer, which is checked for its form as well."""
    ranges = changes.ranges
    assert ranges.dtype == np.int64
    assert ranges.ndim == 2
    assert ranges.shape[1] == 2
    starts, lengths = ranges[:, 0], ranges[:, 1]
    assert (lengths > 0).all()
    assert (starts[1:] > (starts + lengths)[:-1]).all(), "ranges overlap, touch or are out of order"
    assert (starts % changes.tracking_block == 0).all()
    ends = starts + lengths
    assert ((ends % changes.tracking_block == 0) | (ends == size)).all()
    assert (ends <= size).all()
    assert changes.changed_bytes == lengths.sum()
    block = changes.tracking_block
    found: set[int] = set()
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        found.update(range(start // block, -(-end // block)))
    return found


@dataclass
class Model:
    """What a history has to answer; `intervals[i - 1]` is interval i."""

    blocks: int
    active: set[int] = field(default_factory=set)
    intervals: list[set[int]] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    known_since: int = 0
    reason: str | None = None
    size: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes at the snapshots that were taken before the device grew, by their numbers."""

    @property
    def number(self) -> int:
        return len(self.intervals)

    def size_at(self, number: int) -> int:
        return self.sizes.get(number, self.size)

    def grow(self, size: int, block: int) -> set[int]:
        """The blocks that have grown, which count as changed."""
        if not self.size:
            raise ValueError("the model does not know the size")
        for number in range(self.number + 1):
            self.sizes.setdefault(number, self.size)
        grown = set(range(self.size // block, -(-size // block)))
        self.size, self.blocks = size, -(-size // block)
        self.active |= grown
        return grown

    def take(self) -> None:
        self.intervals.append(self.active)
        self.active = set()
        self.held.add(self.number)

    def lose(self, reason: str) -> None:
        self.known_since = self.number + 1
        self.reason = reason

    def changed(self, since: int, until: int) -> set[int]:
        return set().union(*self.intervals[since:until])

    def last_change(self) -> list[int]:
        last = [min(self.known_since, self.number)] * self.blocks
        for number in range(self.known_since + 1, self.number + 1):
            for block in self.intervals[number - 1]:
                last[block] = number
        return last

    def check(self, history: History, *, exact: bool = True) -> None:
        """Compare every answer that can be asked for. Not `exact`: more may be reported, never less."""
        assert history.number == self.number
        assert set(history.held) == self.held
        assert history.active_bytes() == min(len(self.active) * history.tracking_block, history.size)
        for until in self.held | ({self.number} if self.number else set()):
            for since in range(until + 2):
                self._check_query(history, None if since == 0 else since, until, exact=exact)
        last = history.last_change().tolist()
        expected = self.last_change()
        assert last == expected if exact else all(a >= b for a, b in zip(last, expected, strict=True))

    def _check_query(self, history: History, since: int | None, until: int, *, exact: bool) -> None:
        cursor = None if since is None else Cursor(history.generation, since)
        changes = history.changes(cursor, until)
        bits = history.changed_blocks(cursor, until)
        assert bits.shape == (self.blocks,)
        size = self.size_at(until) or history.size
        blocks = -(-size // history.tracking_block)
        found = blocks_of(changes, size)
        assert found == set(np.flatnonzero(bits[:blocks]).tolist())
        assert changes.until == Cursor(history.generation, until)
        assert changes.since == cursor
        number = since or 0
        if number > until or number < self.known_since:
            assert changes.all
            assert changes.reason == ("future" if number > until else self.reason)
            assert found == set(range(blocks))
            return
        assert not bits[blocks:].any()
        assert not changes.all
        assert changes.reason is None
        expected = self.changed(number, until)
        assert found == expected if exact else found >= expected


def files_of(directory: Path) -> set[str]:
    """The files of a history in a directory."""
    return {name for name in os.listdir(directory) if name.startswith(DATA_FILES)}


def expected_files(history: History) -> set[str]:
    """The files that a history needs, no more and no fewer."""
    ahead = [] if history._enlarged is None else history._enlarged.layers
    return {"history.json", *(path.name for path in history._state.paths()), *(layer.path.name for layer in ahead)}
