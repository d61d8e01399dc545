# SPDX-License-Identifier: MIT
"""How a simulated world ends: everything that waits goes on, everything is read once more, everything is freed."""

from __future__ import annotations

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.judge import COPY_LIMIT_NS, MAP_LIMIT_NS
from tests.unit.sim.world import World

READ_SECTORS = 1024


def complete_all(world: World, *, storage: bool = True) -> None:
    """Everything outstanding completes, oldest first; without `storage` only the origins answer."""
    for _ in range(100_000):
        world.run()
        at = next((n for n, io in enumerate(world.ios.values()) if storage or not world.store_of(io)), None)
        if at is None:
            return
        world.complete(at)
    raise AssertionError("the I/O never ends")


def nobody_waits(world: World) -> None:
    """Storages have no limit of rate any more, and nobody waits for room."""
    for number in range(len(world.stores)):
        world.set_rate(number, 0)
        world.set_room(number, 0)
    world.tick(1)


def origins_win(world: World) -> None:
    """Storages are silent from now on: every request of a device ends all the same."""
    for _ in range(6):
        complete_all(world, storage=False)
        world.tick(COPY_LIMIT_NS)
    complete_all(world, storage=False)
    left = [request for request in world.requests.values() if request.id not in world.of_image]
    assert not left, f"silent storage holds back requests of a device: {left}"


def recover(world: World) -> None:
    """What follows a death comes to its end."""
    while not world.swept:
        world.sweep_portion()
    world.end_quarantine()
    complete_all(world)
    if world.starved:
        # Only a shortage of map memory, the present or a past one, makes a request wait for the clock.
        for _ in range(4):
            world.tick(MAP_LIMIT_NS)
            complete_all(world)
    for number in range(len(world.disks)):
        world.close_gate(number)
    while world.again:
        # The youngest first.
        assert world.drop_again(len(world.again) - 1)
        world.hand_over()
    for number in range(len(world.disks)):
        world.open_gate(number)
    complete_all(world)


def preserved(world: World, units: range) -> None:
    """Whole writes, one a unit, that have ended."""
    for unit in units:
        world.change(0, Op.WRITE, 8 * unit, 8)
        complete_all(world)


def swept(world: World) -> None:
    """The sweep comes to its end."""
    while not world.swept:
        world.sweep_portion()


def end(world: World, *, silent: bool = False) -> None:
    """Checks that everything ends, then frees it all."""
    for number in range(len(world.disks)):
        world.open_gate(number)
    nobody_waits(world)
    if silent:
        origins_win(world)
    complete_all(world)
    recover(world)
    assert not world.requests, f"requests that never end: {list(world.requests.values())}"
    for thread in world.threads:
        assert not world.sim.pool_used(thread), "a buffer was not given back"
    read_images(world)
    assert not any(held.serial in world.left for held in world.held), "requests that nobody got again"
    world.hand_over()
    for store in world.stores:
        # The sweep takes a damaged place out of its map; if it was given out since the death, it stays so.
        named = world.named_places(store)
        assert len(named) <= store.used <= len(named | store.damaged), "a place is given out and no map has it"
    for disk in world.disks:
        disk.check_bitmap()
        assert (disk.words == disk.words[:, :1]).all(), "a sector of an origin is torn"
    for store in world.stores:
        store.check_gaps()
    for held in world.held:
        counted, there = held.image.preserved, held.slots() * world.shape.unit
        assert counted == there or (world.torn and counted < there), "it is not known how much was preserved"
    close(world)


def read_images(world: World) -> None:
    """Each image, all of it, through its queue."""
    for number, held in enumerate(world.held):
        for start in range(0, held.disk.count, READ_SECTORS):
            world.read_image(number, start, READ_SECTORS)
            complete_all(world)
            # A write that a dead process left is begun again here, and may wait for map memory.
            for _ in range(4):
                if world.requests:
                    world.tick(MAP_LIMIT_NS)
                    complete_all(world)
        if held.image.status[0] is ImageStatus.ACTIVE and not held.unreadable and not held.store.damaged:
            assert held.sim.first_wrong(held.image, held.content.words) is None
        for interval in held.intervals:
            interval.check()


def close(world: World) -> None:
    """Drops and frees everything; whatever is still in use somewhere is found here."""
    for number, disk in enumerate(world.disks):
        world.close_gate(number)
        assert world.still(disk)
    while world.held:
        assert world.drop(len(world.held) // 2)
    world.hand_over()
    for number, disk in enumerate(world.disks):
        while world.replay(number, 3 * disk.shape.tracking_block):
            pass
        assert not disk.swallowed.any()
        disk.check_bitmap()
    assert not world.gone
    if world.scarcity:
        world.scarcity.close()
    for disk in world.disks:
        for queue in disk.queues:
            world.sim.del_queue(queue)
        disk.device.close()
    assert world.arena.free == world.arena.total, "map memory was lost"
    for store in world.stores:
        assert store.used <= len(store.damaged), "places were lost"
        store.storage.close()
    world.arena.close()
    world.sim.close()
    for buffers in world.buffers + world.unstored:
        buffers.close()
