# SPDX-License-Identifier: MIT
"""The process dies in the midst of a step: a write to a storage has ended, its records and slots are on the way.

Or, with early release, the read of a copy has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import SLOT_ZERO, SimIo
from tests.unit.sim.held import Held
from tests.unit.sim.store import Store
from tests.unit.sim.world import World

STATUS = slice(24, 32)
PRESERVED, WRITTEN = 4, 6
"""64-bit words of an image's state."""

OWNER_BYTES = 8


@dataclass(frozen=True)
class Cut:
    """Which of the writes under way ends, how many of its units are published, how many more have whole records.

    `half`: the next record is half there. `kept`: the record of the place that the last one replaced is not cleared.
    """

    write: int
    published: int
    recorded: int = 0
    half: bool = False
    kept: bool = False


@dataclass
class _Unit:
    """Unit of a write that has ended: its place, and what the image's map had before and has now."""

    unit: int
    place: int
    before: int


def outliving(world: World) -> list[Any]:
    """All memory that another process adopts."""
    images = [held.state for held in world.held + world.gone]
    stores = [memory for store in world.stores for memory in (store.state, *(records for _, records in store.records))]
    bitmaps = [memory for disk in world.disks for memory in (disk.interval.bitmap, disk.swallowed)]
    return [*world.portions, *images, *stores, *bitmaps]


def tear(world: World, cut: Cut) -> bool:
    """Leaves shared memory as a death in the midst of it does; `kill` must follow. Whether there was such a write."""
    writes = [io for io in world.ios.values() if _publishes(world, io)]
    if not writes:
        return False
    io = writes[cut.write % len(writes)]
    every = world.held + world.gone
    slots = {(held.serial, written): _slots(held, io, written) for held in every for written in (False, True)}
    statuses = [held.state[STATUS].copy() for held in every]
    records = {store.number: [(first, memory.copy()) for first, memory in store.records] for store in world.stores}
    world.sim.complete(io.id)
    del world.ios[io.id]
    for held, status in zip(every, statuses, strict=True):
        held.state[STATUS] = status
    for held in every:
        for written in (False, True):
            before, now = slots[held.serial, written], _slots(held, io, written)
            found = [
                _Unit(io.unit + n, now[n] - 1, before[n])
                for n in range(io.units)
                if now[n] != before[n] and 0 < now[n] < SLOT_ZERO
            ]
            if found:
                _unpublish(world, held, found, cut, written=written)
                _forget(held.store, records[held.store.number], found, cut, written=written)
    return True


def _publishes(world: World, io: SimIo) -> bool:
    if io.op is Op.WRITE:
        return world.store_of(io) is not None
    return world.shape.early and io.op is Op.READ and not io.request and not world.store_of(io)


def _slots(held: Held, io: SimIo, written: bool) -> list[int]:
    get = held.sim.written_slot if written else held.sim.slot
    return [get(held.image, unit) for unit in range(io.unit, io.unit + io.units)]


def _unpublish(world: World, held: Held, units: list[_Unit], cut: Cut, *, written: bool) -> None:
    words = held.state[:64].view(np.uint64)
    for each in units[min(cut.published, len(units)) :]:
        world.sim.unpublish(held.image, each.unit, each.before, written=written)
        if not each.before:
            words[WRITTEN if written else PRESERVED] -= np.uint64(1)


def _forget(store: Store, former: list[tuple[int, Any]], units: list[_Unit], cut: Cut, *, written: bool) -> None:
    published = min(cut.published, len(units))
    # Records of a copy come first of all, those of a write to an image each before its slot.
    recorded = (
        published + min(cut.recorded, 1) if written else max(min(cut.recorded, len(units)), published and len(units))
    )
    for n, each in enumerate(units):
        replaced = 0 < each.before < SLOT_ZERO
        if replaced and (n >= published or (cut.kept and n == published - 1)):
            store.record(each.before - 1)[:] = store.record(each.before - 1, former)
        if n >= recorded:
            done = OWNER_BYTES if cut.half and n == recorded else 0
            store.record(each.place)[done:] = store.record(each.place, former)[done:]
