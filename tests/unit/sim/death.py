# SPDX-License-Identifier: MIT
"""The process dies between two steps, and another one takes over what outlives it.

That is: the origins, the active bitmaps, the swallowed trims, and the requests that have not ended, which the kernel
hands out again. Snapshots end with the process. Changes of an origin that it had submitted may still land, in any
order and all or in part, or never; but not after the barrier, which comes before the first request is handed out.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blksnap_ublk.engine._engine import ffi, lib

from blksnap_ublk.engine.request import Op
from tests.unit.sim.disk import Disk
from tests.unit.sim.judge import COPY_LIMIT_NS
from tests.unit.sim.shape import SECTOR
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


class Remains:
    """What only the dead process had. To be taken before its successor begins, and buried some time."""

    def __init__(self, world: World) -> None:
        self._sim, self._arena, self._scarcity, self._stores = world.sim, world.arena, world.scarcity, world.stores
        self._devices = [disk.device for disk in world.disks]
        self._queues = list(world.device_queues)
        self._held, self._gone = world.held, world.gone
        self._ios = set(world.ios)
        self._requests = len(world.requests)
        # What outlives it is its successor's: from here on it has copies.
        self.origins = [bytes(disk.file.data) for disk in world.disks]
        self.bitmaps = [(disk.interval.bitmap.copy(), disk.swallowed.copy()) for disk in world.disks]
        for held in self._held:
            held.state = held.state.copy()

    def bury(self) -> None:
        """Frees it all: whatever is under way in it fails, and nobody hears of that."""
        for device in self._devices:
            device.open_gate()
        for store in self._stores:
            store.storage.set_rate(0)
            store.storage.set_room(wait_ms=0, low=0)
        for _ in range(20):
            self._fail_all()
            if not self._requests:
                break
            self._sim.tick(COPY_LIMIT_NS)
        assert not self._requests, "requests that never end when all I/O fails"
        for held in self._held + self._gone:
            if held.queue is not None:
                self._sim.del_queue(held.queue)
        for device in self._devices:
            device.close_gate()
        for device in self._devices:
            while self._sim.settle(device):
                pass
        for held in self._held:
            held.disk_device.prepare_drop(held.image)
            self._sim.switch([held.disk_device], [None])
        for held in self._held + self._gone:
            held.image.close()
        for queue in self._queues:
            self._sim.del_queue(queue)
        for part in (*self._devices, *(store.storage for store in self._stores), self._scarcity, self._arena):
            if part:
                part.close()
        self._sim.close()

    def _fail_all(self) -> None:
        while True:
            self._sim.run()
            self._ios |= {io.id for io in self._sim.started()}
            self._requests -= len(self._sim.results())
            if not self._ios:
                return
            self._sim.complete(self._ios.pop(), -errno.EIO)


def late_changes(world: World) -> list[Late]:
    """What may still land if the process dies now."""
    found = []
    for io in world.ios.values():
        store = world.store_of(io)
        if store or io.id in world.applied or io.op not in (Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES):
            continue
        memory: Any = lib.bsu_sim_memory(world.sim.pointer, io.id)
        data = bytes(ffi.buffer(memory, io.length)) if memory else bytes(io.length)
        found.append(Late(world.disk_of_queue[io.queue], io.offset, data))
    return found


def die(world: World, landing: Sequence[int]) -> list[Late]:
    """See above. `landing`: which of the late changes land, in which order; HALF and more: only half of it.

    Returns what has not landed: nothing of it may from now on.
    """
    world.sound = False
    late = late_changes(world)
    left = [request for request in world.requests.values() if request.id not in world.of_image]
    at = {queue: (disk, n) for disk in world.disks for n, queue in enumerate(disk.queues)}
    remains = Remains(world)
    world.begin()
    world.requests = {}
    for disk, origin, bitmaps in zip(world.disks, remains.origins, remains.bitmaps, strict=True):
        disk.interval.bitmap, disk.swallowed = bitmaps
        disk.serve(world.sim, world.threads)
        disk.file.data[:] = origin
    world.know_queues()
    remains.bury()
    for number in landing:
        if late:
            late.pop(number % len(late)).land(half=number >= HALF)
    for disk in world.disks:
        disk.check()
        disk.check_bitmap()
    for request in left:
        disk, n = at[request.queue]
        request.queue = disk.queues[n]
        world.begin_again(request)
    world.sound = True
    return late
