# SPDX-License-Identifier: MIT
"""An image and what is known of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.sim import SLOT_BAD, SLOT_ZERO, Simulator
from tests.unit.sim.disk import WORDS, Disk, Words
from tests.unit.sim.image_content import ImageContent
from tests.unit.sim.interval import Interval
from tests.unit.sim.shape import SECTOR
from tests.unit.sim.shared import shared
from tests.unit.sim.store import Store

SERIAL_BITS = 24


class Held:
    """One member of a snapshot. `content`: what its disk held at the instant, and what was written to it since."""

    def __init__(self, sim: Simulator, disk: Disk, store: Store, arena: engine.Arena, serial: int) -> None:
        self.sim = sim
        self.disk = disk
        self.store = store
        self.serial = serial
        self.state = shared(engine.Image.state_bytes(disk.size, disk.shape.unit))
        self.disk_device = disk.device
        self.image = engine.Image(disk.device, store.storage, arena, self.state, serial=serial)
        self.queue: int | None = None
        self.status = ImageStatus.ACTIVE
        self.writes = 0
        self.unreadable: set[int] = set()
        """Units that a copy met an error for, or may have: EIO is right for them."""
        self.exempt: set[int] = set()
        """Units that read as zeroes and are not preserved for it."""

    def adopt(self, sim: Simulator, arena: engine.Arena) -> None:
        """Another process has it from now on, with the state, and the bitmaps, as they are."""
        self.sim = sim
        self.disk_device = self.disk.device
        self.queue = None
        before, after = self.intervals
        adopted = engine.Adopted(self.disk.size, (before.bitmap, after.bitmap))
        self.image = engine.Image(
            self.disk.device, self.store.storage, arena, self.state, serial=self.serial, adopt=adopted
        )

    def taken(self, before: Interval, after: Interval) -> None:
        """This is its instant, between these two intervals."""
        self.content = ImageContent(self.disk.words.copy())
        per_unit = self.disk.shape.unit // SECTOR
        for unit in self.exempt:
            self.content.words[unit * per_unit : (unit + 1) * per_unit] = 0
        self.intervals = (before, after)

    def new_write(self) -> int:
        """Number of its next write: no disk and no other image has it."""
        self.writes += 1
        return self.serial << SERIAL_BITS | self.writes

    @property
    def active(self) -> bool:
        """Whether it can be trusted."""
        return self.image.status[0] is ImageStatus.ACTIVE

    def slots(self) -> int:
        """Units that its own map has and that are not exempt."""
        slots = (self.sim.slot(self.image, unit) for unit in range(self.disk.shape.units))
        return sum(slot not in (0, SLOT_ZERO) for slot in slots)

    def has(self, unit: int) -> bool:
        """Whether its own map has the unit."""
        return self.sim.slot(self.image, unit) != 0

    def check(self, chain: list[Held]) -> None:
        """Read at this moment, with nothing in the way, it would give its content. `chain`: it and those after it."""
        unit = self.sim.first_wrong(self.image, self.content.words)
        while unit is not None:
            self._check_unit(unit, chain)
            unit = self.sim.first_wrong(self.image, self.content.words, unit + 1)

    def _check_unit(self, unit: int, chain: list[Held]) -> None:
        name = f"image {self.serial} of disk {self.disk.number}"
        own = self.sim.written_slot(self.image, unit)
        slot = own or next((slot for held in chain if (slot := self.sim.slot(held.image, unit))), 0)
        if slot == SLOT_BAD:
            assert unit in self.unreadable, f"{name}: unit {unit} cannot be read, and no copy failed"
        elif slot - 1 not in self.store.damaged:
            first = unit * self.disk.shape.unit // SECTOR
            changed, wrong = self.content.becomes(first, self._rows(unit, slot))
            where = "the origin" if not slot else "nowhere" if slot == SLOT_ZERO else f"place {slot - 1}"
            assert wrong is None, f"{name}: sector {wrong} from {where} is not what it holds"
            assert own, f"{name}: unit {unit} has changed, and was not written"
            for sector in changed:
                for interval in self.intervals:
                    interval.changed(sector * SECTOR)

    def _rows(self, unit: int, slot: int) -> Words:
        """The sectors of a unit that comes from there."""
        size = self.disk.shape.unit
        length = min(size, self.disk.size - unit * size)
        if slot == SLOT_ZERO:
            return np.zeros((length // SECTOR, WORDS), dtype=np.uint64)
        data: Any = self.store.data_of(slot - 1) if slot else self.disk.file.data[unit * size : unit * size + length]
        return np.frombuffer(data[:length], np.uint64).reshape(-1, WORDS)


def would_break(chain: list[Held], units: range) -> set[int]:
    """Serials of the images of a chain, oldest first, that may be broken because these units cannot be preserved."""
    lacking: set[int] = set()
    for unit in units:
        for held in reversed(chain):
            if held.has(unit):
                break
            lacking.add(held.serial)
    return lacking
