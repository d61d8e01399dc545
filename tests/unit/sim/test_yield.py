# SPDX-License-Identifier: MIT
"""Images make do with little while their device has requests; a storage that is silent leaves buffers to others."""

from __future__ import annotations

import errno

import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim import instants
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.judge import COPY_LIMIT_NS, S
from tests.unit.sim.look import ACTIVE, find, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

MS = 1_000_000
FEW = 4
REST = 20 * MS
ALL = 20
"""Of a queue of depth 2."""


def scattered(depth: int = 2, storages: tuple[tuple[int, ...], ...] = ((1000,),)) -> World:
    """An image of 80 units, every second one of which lies in storage."""
    world = World(Shape(units=80, odd_sectors=0, depth=depth, queues=1, storages=storages))
    take(world, 0, trouble=None)
    for unit in range(0, 80, 2):
        world.change(0, Op.WRITE, unit * 8, 8)
        complete_all(world)
    return world


def rest(world: World) -> None:
    """The device has had no request for a while."""
    world.read_image(0, 0, 8)
    complete_all(world)
    world.tick(S)


def of_image(world: World) -> int:
    """Parts of requests to images under way."""
    return sum(io.request in world.of_image for io in world.ios.values())


def test_few_parts_while_the_device_is_busy_and_all_when_it_rests() -> None:
    world = scattered()
    world.read_image(0, 0, 640)
    assert of_image(world) == FEW
    complete_all(world)
    rest(world)
    world.read_image(0, 0, 640)
    assert of_image(world) == ALL
    complete_all(world)
    world.read(0, 0, 8)
    world.read_image(0, 0, 640)
    assert of_image(world) == FEW
    complete_all(world)
    world.pass_time(REST - 1)
    world.read_image(0, 0, 640)
    assert of_image(world) == FEW
    complete_all(world)
    world.pass_time(1)
    world.read_image(0, 0, 640)
    assert of_image(world) == ALL
    complete_all(world)
    end(world)


def test_requests_to_images_end_though_the_device_is_never_at_rest() -> None:
    world = scattered(depth=8)
    for start in range(0, 640, 80):
        world.read_image(0, start, 80)
    for _ in range(1000):
        if not world.requests:
            break
        world.read(0, 0, 8)
        world.complete(find(world, Kind.READ))
        assert of_image(world) <= FEW
        world.complete(0)
    assert not world.requests
    end(world)


def test_who_waits_gets_all_when_the_device_comes_to_rest() -> None:
    """The parts under way may be kept by a storage that is silent."""
    world = scattered(depth=8)
    for unit in range(0, 8, 2):
        world.read_image(0, 8 * unit, 8)
    assert waiting(world) == [Kind.IMAGE_FROM_STORAGE] * FEW
    for unit in range(1, 9, 2):
        world.read_image(0, 8 * unit, 8)
    assert of_image(world) == FEW
    world.tick(S)
    assert waiting(world) == [Kind.IMAGE_FROM_STORAGE] * FEW + [Kind.IMAGE_FROM_ORIGIN] * FEW
    complete_all(world)
    end(world)


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_requests_that_wait_behind_parts_that_were_given_up(op: Op) -> None:
    """Silent storage keeps all parts: who waits for one ends with EIO after the limit, as those before did."""
    world = World(Shape(units=40, odd_sectors=0, depth=2, queues=1))
    take(world, 0, trouble=None)
    for unit in range(39, -1, -1):
        world.change(0, Op.WRITE, 8 * unit, 8)
        complete_all(world)
    rest(world)
    first = world.read_image(0, 0, 8 * ALL)
    assert waiting(world) == [Kind.IMAGE_FROM_STORAGE] * ALL
    world.tick(S)
    second = world.read_image(0, 8 * ALL, 8) if op is Op.READ else world.write_image(0, op, 8 * ALL, 8)
    assert first
    assert second
    world.tick(COPY_LIMIT_NS - S)
    assert (first.result, second.result) == (-errno.EIO, None)
    world.tick(S)
    assert second.result == -errno.EIO
    assert statuses(world) == [ACTIVE]
    third = world.read_image(0, 0, 8)
    assert third
    complete_all(world)
    assert third.result == 4096
    end(world)


def test_who_waits_for_a_part_ends_when_the_image_breaks() -> None:
    world = scattered(depth=8)
    requests = [world.read_image(0, 8 * unit, 8) for unit in range(0, 16, 2)]
    world.forsake(0)
    world.tick(1)
    assert [request.result for request in requests if request] == [-errno.EIO] * 8
    complete_all(world)
    end(world)


def silent(world: World) -> None:
    """What has come so far to the first storage is not answered; all else is."""
    for _ in range(1000):
        world.run()
        at = next((n for n, io in enumerate(world.ios.values()) if world.store_of(io) is not world.stores[0]), None)
        if at is None:
            return
        world.complete(at)
    raise AssertionError("the I/O never ends")


def test_a_silent_storage_leaves_buffers_to_others() -> None:
    """Two disks on one thread, each with a storage of its own; that of the first one does not answer."""
    shape = Shape(units=600, odd_sectors=0, disks=2, threads=1, queues=1, depth=16, storages=((600,), (600,)))
    world = World(shape)
    for number in range(2):
        take(world, number, store=number, trouble=None)
    for number in range(10):
        world.change(0, Op.WRITE, 400 * number, 400)
    silent(world)
    for number in range(10):
        world.change(1, Op.WRITE, 256 * number, 256)
    silent(world)
    assert {world.disk_of_queue[request.queue].number for request in world.requests.values()} == {0}
    assert statuses(world) == [ACTIVE] * 2
    world.tick(COPY_LIMIT_NS)
    silent(world)
    assert not world.requests
    assert statuses(world) == [(ImageStatus.CORRUPTED, errno.ETIMEDOUT), ACTIVE]
    complete_all(world)
    end(world)


def test_nobody_waits_twice_for_a_silent_storage() -> None:
    """Until one of its writes ends, snapshots that need it are given up at once."""
    world = World(Shape(units=40, odd_sectors=0))
    take(world, 0, trouble=None)
    for unit in range(2):
        world.change(unit, Op.WRITE, 8 * unit, 8)
    silent(world)
    world.tick(COPY_LIMIT_NS)
    silent(world)
    assert statuses(world) == [(ImageStatus.CORRUPTED, errno.ETIMEDOUT)]
    world.close_gate(0)
    assert world.take([0], 0)
    world.open_gate(0)
    world.change(0, Op.WRITE, 80, 8)
    assert statuses(world)[1] == (ImageStatus.CORRUPTED, errno.ETIMEDOUT)
    assert Kind.CHANGE in waiting(world)
    silent(world)
    assert not world.requests
    world.complete(0)
    world.close_gate(0)
    assert world.take([0], 0)
    world.open_gate(0)
    world.change(0, Op.WRITE, 160, 8)
    complete_all(world)
    assert statuses(world)[2] == ACTIVE
    end(world)


def test_more_storages_than_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write costs a copy for each of them."""
    monkeypatch.setattr(instants, "MOST_HELD", 100)
    world = World(Shape(units=4, odd_sectors=0, threads=1, queues=1, depth=40, storages=((4,),) * 80))
    for store in range(80):
        take(world, 0, store=store, trouble=None)
    for start in (0, 8):
        world.change(0, Op.WRITE, start, 8)
    for image in range(0, 80, 5):
        world.read_image(image, 0, 32)
    complete_all(world)
    assert not world.requests
    assert statuses(world) == [ACTIVE] * 80
    assert all(store.used == 2 for store in world.stores)
    end(world)
