# SPDX-License-Identifier: MIT
"""A difference storage and what is known of its places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from blksnap_ublk import engine
from blksnap_ublk.engine.sim import SimFile, SimIo, Simulator
from tests.unit.sim.shared import shared

GAP = 512
"""Bytes before and after each area that nobody may write."""


QUARANTINE_WAIT_NS = 5_000_000_000
"""What writers wait at least while it is not known which places are free."""


class Place:
    """FREE: may be given out. BUSY: a storage write is under way. USED: written."""

    FREE = 0
    BUSY = 1
    USED = 2


class Store:
    """A storage of areas that lie in files of their own."""

    def __init__(self, sim: Simulator, unit: int, areas: tuple[int, ...], number: int) -> None:
        self.sim = sim
        self.unit = unit
        self.number = number
        self.state = shared(engine.STORAGE_STATE_BYTES)
        self.storage = engine.Storage(self.state, unit=unit, number=number)
        self.files: dict[int, tuple[SimFile, int]] = {}
        """By index: the file, and the place that it begins with."""
        self.records: list[tuple[int, Any]] = []
        """Of each area: its first place, and the memory of its records."""
        self.places = np.zeros(0, dtype=np.uint8)
        self.damaged: set[int] = set()
        """Places whose data a test has changed."""
        self._contents: list[bytes] = []
        self._used = 0
        self.unused_before = 0
        """Places that were left when the step under way began."""
        self._wait_ns = 0
        self.low = 0
        """Places: control is told, once, when fewer are free."""
        self.told = False
        """Whether it may have been, since that was set or an area was added."""
        self.quarantined = False
        self.late: set[int] = set()
        """Places that a dead process may still write."""
        for units in areas:
            self.grow(units)

    def died(self) -> None:
        """The process that has it is about to die: its files go with their simulator."""
        self._contents = [bytes(file.data) for file, _ in self.files.values()]

    def adopt(self, sim: Simulator) -> None:
        """Another process has it from now on: with the shared memory that there is, and files that hold the same."""
        self.sim = sim
        self.quarantined = bool(self.state.view(np.uint64)[2])
        self.storage = engine.Storage(self.state, unit=self.unit, number=self.number, adopt=True)
        self.files = {}
        for content, (first, records) in zip(self._contents, self.records, strict=True):
            file = sim.add_file(len(content))
            file.data[:] = content
            self.storage.add_area(file, GAP, len(content) - GAP - 1, records)
            self.files[file.index] = (file, first)
        self.places[self.places == Place.BUSY] = Place.USED
        self._used = -1
        self.set_room(wait_ms=self._wait_ns // 1_000_000, low=self.low)

    def end_quarantine(self) -> None:
        """What dead processes wrote has landed, or never will."""
        self.late.clear()
        self.storage.end_quarantine()
        self.quarantined = False

    @property
    def wait_ns(self) -> int:
        """For room, before it overflows."""
        return max(self._wait_ns, QUARANTINE_WAIT_NS) if self.quarantined else self._wait_ns

    def grow(self, units: int) -> None:
        """Appends an area."""
        length = units * self.unit
        file = self.sim.add_file(GAP + length + GAP)
        records = shared(self.storage.records_bytes(length))
        self.storage.add_area(file, GAP, length + GAP - 1, records)
        self.told = False
        self.files[file.index] = (file, len(self.places))
        self.records.append((len(self.places), records))
        self.places = np.concatenate([self.places, np.zeros(units, dtype=np.uint8)])

    def set_room(self, *, wait_ms: int, low: int) -> None:
        """See engine.Storage; `low`: places."""
        self._wait_ns = wait_ms * 1_000_000
        self.low = low
        self.told = False
        self.storage.set_room(wait_ms=wait_ms, low=low * self.unit)

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return int(self.state.view(np.uint32)[11])

    @property
    def used(self) -> int:
        """Places given out."""
        return self.storage.used // self.unit

    @property
    def unused(self) -> int:
        """Places that are left."""
        return len(self.places) - self.used

    @property
    def kept(self) -> int:
        """Places that writes to images leave to copies."""
        return (len(self.places) + 7) // 8

    def places_of(self, io: SimIo) -> slice:
        """Which places an I/O is about."""
        first = self.files[io.file][1] + (io.offset - GAP) // self.unit
        return slice(first, first + (io.length + self.unit - 1) // self.unit)

    def write_began(self, io: SimIo, referred: Callable[[int], bool]) -> None:
        """Something is written: nobody else has these places. `referred`: whether a map has a place."""
        places = self.places_of(io)
        if not io.again:
            assert io.length == io.units * self.unit
            for place in range(places.start, places.stop):
                known = self.places[place]
                free = known == Place.FREE or (known == Place.USED and not referred(place))
                assert place not in self.late, f"place {place} is written, and a dead process may write it too"
                assert free, f"place {place} is given out twice, now for unit {io.unit}"
                assert self.sim.place_used(self.storage, place), f"place {place} is written and not given out"
        self.places[places] = Place.BUSY
        self.damaged -= set(range(places.start, places.stop))

    def write_ended(self, io: SimIo) -> None:
        """A write, all of it or its rest, has ended for good."""
        stop = self.places_of(io).stop
        self.places[stop - io.units : stop] = Place.USED
        self._used = -1
        self.check()

    def check(self) -> None:
        """Places that went back are free, and nobody writes to them."""
        used = self.used
        if used == self._used:
            return
        for place in np.flatnonzero(self.places):
            if not self.sim.place_used(self.storage, int(place)):
                assert self.places[place] != Place.BUSY, "a place went back while it is written"
                assert int(place) not in self.late, "a place went back while a dead process may write it"
                self.places[place] = Place.FREE
        self._used = used

    def record(self, place: int, records: list[tuple[int, Any]] | None = None) -> Any:
        """The 16 bytes that say what a place holds; in a copy of `records`, if there is one."""
        first, memory = max((area for area in records or self.records if area[0] <= place), key=lambda area: area[0])
        return memory[16 * (place - first) : 16 * (place - first + 1)]

    def damage_record(self, place: int, byte: int) -> None:
        """Changes a byte of it."""
        self.record(place)[byte] ^= 1 << byte % 8
        self.damaged.add(place)

    def damage(self, place: int, byte: int) -> None:
        """Changes a byte of a place that was written."""
        for file, first in self.files.values():
            offset = GAP + (place - first) * self.unit
            if first <= place and offset < len(file.data) - GAP:
                data: Any = np.frombuffer(file.data, np.uint8)
                data[offset + byte % self.unit] ^= 1 << byte % 8
                self.damaged.add(place)

    def data_of(self, place: int) -> Any:
        """What is in a place at the moment."""
        file, first = max((area for area in self.files.values() if area[1] <= place), key=lambda area: area[1])
        offset = GAP + (place - first) * self.unit
        return file.data[offset : offset + self.unit]

    def check_gaps(self) -> None:
        """Nobody wrote outside the areas."""
        for file, _ in self.files.values():
            data = bytes(file.data[:GAP]) + bytes(file.data[len(file.data) - GAP :])
            assert not any(data), f"file {file.index} was written outside its area"
