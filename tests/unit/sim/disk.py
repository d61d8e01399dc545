# SPDX-License-Identifier: MIT
"""A filtered device and what is known of it: every write, which contents are possible, what changed since when.

Each 8-byte word of a sector that write number w put there is w << 24 | sector; zeroes are zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blksnap_ublk import engine
from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import Simulator
from tests.unit.sim.interval import Interval
from tests.unit.sim.shape import SECTOR, Shape

WORDS = SECTOR // 8
IN_FLIGHT = np.iinfo(np.int64).max
SECTOR_BITS = 24

Words = np.ndarray[Any, np.dtype[np.uint64]]


def stamps(write: int, first: int, count: int) -> Words:
    """The value of each of `count` sectors from `first` on."""
    return np.arange(first, first + count, dtype=np.uint64) | np.uint64(write << SECTOR_BITS)


def filled(values: Words) -> Words:
    """Whole sectors of these values, a row each."""
    return np.repeat(values, WORDS).reshape(-1, WORDS)


@dataclass
class Request:
    """One request; `floor`: for each sector, what a read must not be older than; of an image: what it was."""

    id: int
    queue: int
    op: Op
    flags: int
    start: int
    length: int
    submitted: int
    submitted_ns: int
    data: Words | None = None
    write: int = 0
    floor: Any = None
    also: list[tuple[int, Words]] = field(default_factory=list)
    """Of a read of an image: what its sectors, counted from its first, have become meanwhile."""
    parked: bool = False
    """It came while the gate was closed, which has not been opened since."""
    result: int | None = None
    errors: list[int] = field(default_factory=list)
    """Results of its I/O, negative errnos, but for those that only ask for a repetition."""

    @property
    def sectors(self) -> slice:
        """What it covers."""
        return slice(self.start // SECTOR, (self.start + self.length) // SECTOR)

    @property
    def changes(self) -> bool:
        """Whether it may change the disk or the image that it is for."""
        return self.op in (Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES)


class Disk:
    """A device under test with its queues and its model."""

    def __init__(self, sim: Simulator, shape: Shape, threads: list[int], number: int) -> None:
        self.shape = shape
        self.number = number
        self.size = shape.size
        self.count = self.size // SECTOR
        self.interval = Interval(self.size, shape.tracking_block)
        """The one that the active bitmap is for."""
        self.swallowed = self.interval.new_bitmap()
        self.open(sim)
        self.serve(sim, threads)
        # What may be there. A write may be seen from its submission on, until another one that was submitted after
        # its end has ended itself. `ended` is indexed by write number, the others by sector.
        self.ended = np.full(1024, IN_FLIGHT, dtype=np.int64)
        self.ended[:2] = 0
        self.writes = 1
        self.superseded = np.zeros(self.count, dtype=np.int64)
        self.zeroing = np.zeros(self.count, dtype=np.int64)
        self.zeroed = np.full(self.count, -1, dtype=np.int64)
        self.words[:] = filled(stamps(1, 0, self.count))
        self.base = self.words.copy()
        """What it held when the interval began."""

    def open(self, sim: Simulator) -> None:
        """Makes the device, with the bitmaps that there are, on an origin of zeroes."""
        shape = self.shape
        self.file = sim.add_file(self.size)
        self.words: Words = np.frombuffer(self.file.data, np.uint64).reshape(-1, WORDS)
        self.device = engine.Device(
            size=self.size,
            unit=shape.unit,
            tracking_block=shape.tracking_block,
            origin=self.file,
            bitmap=self.interval.bitmap,
            swallowed=self.swallowed,
        )
        self.gate_closed = False

    def serve(self, sim: Simulator, threads: list[int]) -> None:
        """Makes its queues."""
        shape = self.shape
        self.queues = [
            sim.add_queue(
                threads[(self.number + n) % len(threads)],
                device=self.device,
                depth=shape.depth,
                zero_copy=shape.zero_copy,
            )
            for n in range(shape.queues)
        ]

    def submitted(self, request: Request) -> None:
        """A request begins."""
        if request.changes:
            self.interval.touch(request.start, request.length)
        if request.op in (Op.DISCARD, Op.WRITE_ZEROES):
            self.zeroing[request.sectors] += 1
        elif request.op is Op.READ:
            request.floor = self.superseded[request.sectors].copy()

    def new_write(self) -> int:
        """Number of the next write."""
        self.writes += 1
        if self.writes == len(self.ended):
            self.ended = np.concatenate([self.ended, np.full_like(self.ended, IN_FLIGHT)])
        return self.writes

    def completed(self, request: Request, success: bool, now: int) -> None:
        """A request ended."""
        if not request.changes:
            return
        if request.op is Op.WRITE:
            self.ended[request.write] = now
        else:
            self.zeroing[request.sectors] -= 1
            np.maximum(self.zeroed[request.sectors], now, out=self.zeroed[request.sectors])
        if success and request.op is not Op.DISCARD:
            part = self.superseded[request.sectors]
            np.maximum(part, request.submitted, out=part)

    def impossible(self, values: Words, first: int, floor: Any) -> int | None:
        """The first sector whose value was never written there, or superseded before `floor`."""
        part = slice(first, first + len(values))
        write = (values >> np.uint64(SECTOR_BITS)).astype(np.int64)
        sector = (values & np.uint64((1 << SECTOR_BITS) - 1)).astype(np.int64)
        known = (sector == np.arange(part.start, part.stop)) & (write <= self.writes)
        written = known & (self.ended[np.minimum(write, self.writes)] >= floor)
        zero = (self.zeroing[part] > 0) | (self.zeroed[part] >= floor)
        wrong = np.flatnonzero(~np.where(values == 0, zero, written))
        return None if not len(wrong) else first + int(wrong[0])

    def check(self) -> None:
        """What the origin holds is possible."""
        at = self.impossible(self.words[:, 0], 0, self.superseded)
        assert at is None, f"disk {self.number}: sector {at} holds {int(self.words[at, 0]):#x}"

    def check_bitmap(self) -> None:
        """The active bitmap has every block that differs from the last switch, and none that nobody touched."""
        differs = (self.words != self.base).any(axis=1)
        per_block = self.shape.tracking_block // SECTOR
        self.interval.must |= np.logical_or.reduceat(differs, np.arange(0, self.count, per_block))
        self.interval.check()

    def switched(self, interval: Interval, in_flight: list[Request]) -> None:
        """An interval begins; `in_flight`: requests that have begun and not ended, which the gate holds."""
        self.interval = interval
        self.base = self.words.copy()
        for request in in_flight:
            if request.changes:
                interval.touch(request.start, request.length)
