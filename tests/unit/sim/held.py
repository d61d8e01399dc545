# SPDX-License-Identifier: MIT
"""An image and what is known of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.sim import SLOT_BAD, Simulator
from tests.unit.sim.disk import Disk
from tests.unit.sim.store import Store


class Held:
    """One member of a snapshot. `expected`: what its disk held at the instant."""

    def __init__(self, sim: Simulator, disk: Disk, store: Store, arena: engine.Arena, serial: int) -> None:
        self.sim = sim
        self.disk = disk
        self.store = store
        self.serial = serial
        self.state = np.zeros(engine.Image.state_bytes(disk.size, disk.shape.unit), dtype=np.uint8)
        self.disk_device = disk.device
        self.image = engine.Image(disk.device, store.storage, arena, self.state, serial=serial)
        self.expected: Any = None
        self.queue: int | None = None
        self.status = ImageStatus.ACTIVE
        self.unreadable: set[int] = set()
        """Units that a copy met an error for, or may have: EIO is right for them."""

    def has(self, unit: int) -> bool:
        """Whether its own map has the unit."""
        return self.sim.slot(self.image, unit) != 0

    def check(self, chain: list[Held]) -> None:
        """Read at this moment, with nothing in the way, it would give `expected`. `chain`: it and those after it."""
        unit = self.sim.first_wrong(self.image, self.expected)
        while unit is not None:
            slot = next((slot for held in chain if (slot := self.sim.slot(held.image, unit))), 0)
            right = unit in self.unreadable if slot == SLOT_BAD else slot - 1 in self.store.damaged
            where = "the origin" if not slot else "nowhere" if slot == SLOT_BAD else f"place {slot - 1}"
            assert right, f"image {self.serial} of disk {self.disk.number}: unit {unit} from {where} is not its instant"
            unit = self.sim.first_wrong(self.image, self.expected, unit + 1)


def would_break(chain: list[Held], units: range) -> set[int]:
    """Serials of the images of a chain, oldest first, that may be broken because these units cannot be preserved."""
    lacking: set[int] = set()
    for unit in units:
        for held in reversed(chain):
            if held.has(unit):
                break
            lacking.add(held.serial)
    return lacking
