# SPDX-License-Identifier: MIT
"""What an image holds: its instant, and since then what has been written to it.

What a write puts there appears at one moment for each sector, and a read gives each sector as it was at some moment
while the read was under way. Changes that overlap take effect in the order in which they arrive.
"""

from __future__ import annotations

import numpy as np

from blksnap_ublk.engine.request import Op
from tests.unit.sim.disk import Request, Words
from tests.unit.sim.shape import SECTOR

NOTHING = np.uint64(0)


def _covers(request: Request, sector: int) -> bool:
    return request.start <= sector * SECTOR < request.start + request.length


def _puts(change: Request, sector: int, row: Words) -> bool:
    """Whether the change leaves that in that sector."""
    if not _covers(change, sector):
        return False
    value = NOTHING if change.data is None else change.data[sector - change.sectors.start, 0]
    return bool((row == value).all())


class ImageContent:
    """`words`: a row for each sector, as it is now."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self._changes: list[Request] = []
        """Under way, or ended in this step, in the order in which they arrived."""
        self._reads: list[Request] = []
        self._ended: list[Request] = []

    def begins(self, request: Request) -> None:
        """A READ, WRITE or WRITE_ZEROES is submitted."""
        if request.op is Op.READ:
            request.floor = self.words[request.sectors].copy()
            self._reads.append(request)
        else:
            self._changes.append(request)

    def died(self) -> None:
        """The process that served it has died: reads under way have seen nothing, changes may have done anything."""
        self._reads.clear()

    def begins_again(self, request: Request) -> None:
        """Its successor gets a request that was under way then."""
        if request in self._changes:
            self._changes.remove(request)
        if request.op is not Op.FLUSH:
            request.also.clear()
            self.begins(request)

    def ends(self, request: Request) -> None:
        """It has ended, well or not."""
        if request.op is Op.READ:
            self._reads.remove(request)
        else:
            self._ended.append(request)

    @property
    def changing(self) -> bool:
        """Whether a change is under way, or was in this step."""
        return bool(self._changes)

    def next_step(self) -> None:
        """What ended in the step before changes nothing any more."""
        if self._ended:
            self._changes = [change for change in self._changes if change not in self._ended]
            self._ended.clear()

    def becomes(self, first: int, rows: Words) -> tuple[list[int], int | None]:
        """Sectors from `first` on hold `rows` now: which of them have changed, and the first that cannot have."""
        differs = (self.words[first : first + len(rows)] != rows).any(axis=1)
        changed = [first + int(at) for at in np.flatnonzero(differs)]
        for sector in changed:
            row = rows[sector - first]
            if not any(_puts(change, sector, row) for change in self._changes):
                return changed, sector
            self.words[sector] = row
            for read in self._reads:
                if _covers(read, sector):
                    read.also.append((sector - read.sectors.start, row.copy()))
        return changed, None

    def misread(self, read: Request) -> int | None:
        """The first sector that a read which succeeded gave as it never was while the read was under way."""
        assert read.data is not None
        right = (read.data == read.floor).all(axis=1)
        for at, row in read.also:
            right[at] = right[at] or bool((read.data[at] == row).all())
        wrong = np.flatnonzero(~right)
        return read.sectors.start + int(wrong[0]) if len(wrong) else None

    def unwritten(self, change: Request) -> int | None:
        """The first sector where a change that succeeded has left no trace, and no later one instead."""
        later = self._changes[self._changes.index(change) :]
        for sector in range(change.sectors.start, change.sectors.stop):
            if not any(_puts(other, sector, self.words[sector]) for other in later):
                return sector
        return None
