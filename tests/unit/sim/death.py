# SPDX-License-Identifier: MIT
"""The process dies between two steps, and another one takes over what outlives it.

That is: origins and storages, state files of storages and images, records, map memory, bitmaps, swallowed trims, and
the requests that have not ended, which the kernel hands out again. Changes of an origin that the dead process had
submitted may still land, in any order and all or in part, or never; but not after the barrier, which comes before the
first request is handed out. Its writes to storages may land until their quarantine ends.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from blksnap_ublk.engine._engine import ffi, lib

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import SimIo
from tests.unit.sim.aftermath import LateStore
from tests.unit.sim.disk import Disk, Request
from tests.unit.sim.held import Held
from tests.unit.sim.shape import SECTOR
from tests.unit.sim.store import Store
from tests.unit.sim.torn import Cut, tear
from tests.unit.sim.world import World

HALF = 40


@dataclass(frozen=True)
class Late:
    """A change of an origin that was submitted and had not ended; `data`: what it puts there."""

    disk: Disk
    offset: int
    data: bytes

    def land(self, *, half: bool = False) -> None:
        """It reaches the origin, or the first half of its sectors does."""
        sectors = len(self.data) // SECTOR
        length = (sectors // 2 if half else sectors) * SECTOR
        self.disk.file.data[self.offset : self.offset + length] = self.data[:length]


def _data_of(world: World, io: SimIo) -> bytes:
    memory: Any = lib.bsu_sim_memory(world.sim.pointer, io.id)
    return bytes(ffi.buffer(memory, io.length)) if memory else bytes(io.length)


def late_changes(world: World) -> list[Late]:
    """What may still land on the origins if the process dies now."""
    return [
        Late(world.disk_of_queue[io.queue], io.offset, _data_of(world, io))
        for io in world.ios.values()
        if not world.store_of(io) and io.id not in world.applied and io.op in (Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES)
    ]


def _late_store(world: World, io: SimIo, store: Store) -> LateStore:
    places = store.places_of(io)
    store.late |= set(range(places.start, places.stop))
    return LateStore(store, list(store.files).index(io.file), io.offset, _data_of(world, io))


def _late_storage_writes(world: World) -> list[LateStore]:
    found = []
    for io in world.ios.values():
        store = world.store_of(io)
        if store and io.op is Op.WRITE and io.id not in world.applied:
            found.append(_late_store(world, io, store))
    return found


def _leave_requests(world: World) -> tuple[list[Request], dict[int, list[Request]]]:
    """Those of devices, and those of images by serial, that the kernel hands out again."""
    of_images = dict(world.left)
    for number, held in world.of_image.items():
        if held in world.held:
            of_images.setdefault(held.serial, []).append(world.requests[number])
    for held in world.held:
        held.content.died()
    return [request for request in world.requests.values() if request.id not in world.of_image], of_images


def _kill(world: World) -> None:
    if world.scarcity:
        world.scarcity.close()
    parts = [world.sweep, *(store.storage for store in world.stores), world.arena]
    images = [held.image for held in world.held + world.gone]
    world.sim.kill([disk.device for disk in world.disks], images, [part for part in parts if part])
    world.sweep = None


def _adopt(world: World, portions: list[Any]) -> None:
    """What the successor does before it serves anything."""
    for store in world.stores:
        store.adopt(world.sim)
    # Images are looked at after each step. It does no harm to do it again: see Aftermath.sweep_portion.
    world.store_unstored()
    for portion in portions:
        world.arena.add(portion, adopt=True)
    world.portions = portions
    if world.shape.map_memory or portions:
        world.add_map_memory()
    for held in sorted(world.held + world.gone, key=lambda held: held.serial):
        try:
            held.adopt(world.sim, world.arena)
        except OSError as error:
            if error.errno != errno.EBADMSG or not world.flipped:
                raise
            _lose(world, held)
        else:
            world.adopted.append(held)


def _lose(world: World, lost: Held) -> None:
    """Its state does not fit. Older ones of its chain may read through it."""
    for held in world.adopted:
        if held.disk is lost.disk and held.store is lost.store:
            held.image.break_(ImageStatus.CORRUPTED, errno.EBADMSG)
    for images in (world.held, world.gone, world.again):
        if lost in images:
            images.remove(lost)
    world.left.pop(lost.serial, None)
    world.lost.append(lost.serial)


def die(
    world: World, landing: Sequence[int], cut: Cut | None = None, flip: Callable[[World], None] | None = None
) -> list[Late]:
    """See above. `landing`: which of the late changes land, in which order; HALF and more: only half of it.
    `cut`: it dies in the midst of a step. `flip`: what changes in shared memory before another process adopts it.

    Returns what has not landed: nothing of it may from now on.
    """
    world.next_step()
    if cut:
        tear(world, cut)
    late = late_changes(world)
    world.late += _late_storage_writes(world)
    left, left_of_images = _leave_requests(world)
    at = {queue: (disk, n) for disk in world.disks for n, queue in enumerate(disk.queues)}
    held, gone, portions = world.held, world.gone, world.portions
    origins = [bytes(disk.file.data) for disk in world.disks]
    for store in world.stores:
        store.died()
    _kill(world)
    if flip:
        world.flipped = True
        flip(world)

    world.begin(former=True)
    world.held, world.gone, world.left = held, gone, left_of_images
    world.again = sorted(gone, key=lambda held: held.serial)
    world.requests = {}
    for disk, origin in zip(world.disks, origins, strict=True):
        disk.open(world.sim)
        disk.file.data[:] = origin
    _adopt(world, portions)
    for number in landing:
        if late:
            late.pop(number % len(late)).land(half=number >= HALF)
    for disk in world.disks:
        disk.serve(world.sim, world.threads)
        disk.check()
        disk.check_bitmap()
    world.know_queues()
    for request in left:
        disk, n = at[request.queue]
        request.queue = disk.queues[n]
        world.begin_again(request)
    world.next_step()
    world.settle()
    return late
