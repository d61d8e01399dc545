# SPDX-License-Identifier: MIT
"""Steps of a simulated world after a death: what the dead process wrote lands, what it left is swept, or is free."""

from __future__ import annotations

from dataclasses import dataclass

from blksnap_ublk import engine
from tests.unit.sim.instants import Instants
from tests.unit.sim.shape import SECTOR, Shape
from tests.unit.sim.store import Store


@dataclass(frozen=True)
class LateStore:
    """A write to a storage that a dead process had submitted. `area`: index; `offset`: bytes in its file."""

    store: Store
    area: int
    offset: int
    data: bytes

    def land(self, *, half: bool) -> None:
        """It reaches the storage, or the first half of its sectors does."""
        sectors = len(self.data) // SECTOR
        length = (sectors // 2 if half else sectors) * SECTOR
        file, _ = list(self.store.files.values())[self.area]
        file.data[self.offset : self.offset + length] = self.data[:length]


class Aftermath(Instants):
    """Methods as those of World."""

    def __init__(self, shape: Shape, *, prompt: bool = True) -> None:
        super().__init__(shape, prompt=prompt)
        self.late: list[LateStore] = []
        """Of all dead processes, until the quarantine ends."""
        self.sweep: engine.Sweep | None = None

    def land(self, late: int, *, half: bool = False) -> None:
        """A write of a dead process reaches its storage, or half of it does."""
        if self.late:
            self.next_step()
            self.late.pop(late % len(self.late)).land(half=half)
            self.settle()

    def sweep_portion(self) -> None:
        """A part of the sweep; the first one begins it."""
        if self.swept:
            return
        self.next_step()
        if not self.sweep:
            self.store_unstored()
            self.unstored = []
            storages = [store.storage for store in self.stores]
            self.sweep = engine.Sweep(self.arena, storages, [held.image for held in self.adopted], lost=self.lost)
        if self.sweep.run(-1.0):
            self.sweep.close()
            self.sweep = None
            self.swept = True
        self.settle()

    def end_quarantine(self) -> None:
        """After the sweep: nothing of a dead process lands any more."""
        if not self.swept:
            return
        self.next_step()
        self.late.clear()
        for store in self.stores:
            store.end_quarantine()
        self.settle()

    def drop_again(self, image: int) -> bool:
        """An image that was going when its process died goes; whether it was possible."""
        if not self.swept or not self.again:
            return False
        held = self.again[image % len(self.again)]
        if self.goes_later(held) or (not self.younger_active(held) and not self.still(held.disk)):
            return False
        self.settle_switch(held.disk)
        self._leave(held)
        return True
