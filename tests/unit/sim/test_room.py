# SPDX-License-Identifier: MIT
"""Difference storage that is full or nearly so: who waits for room, what overflows, what goes to make some."""

from __future__ import annotations

import errno

import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.judge import MAP_LIMIT_NS, S
from tests.unit.sim.look import ACTIVE, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

OVERFLOWN = (ImageStatus.OVERFLOWN, errno.ENOSPC)


def full(*storages: tuple[int, ...], wait_ms: int, images: int = 1) -> World:
    """A world whose first storage was filled by writes to its first units; the other ones have images too."""
    world = World(Shape(units=40, odd_sectors=0, storages=storages))
    for store in range(len(storages)):
        for _ in range(images):
            take(world, 0, store=store, trouble=None)
    world.set_room(0, wait_ms)
    for unit in range(sum(storages[0])):
        world.change(0, Op.WRITE, 8 * unit, 8)
        complete_all(world)
    return world


# ---- waiting for room ----


def test_a_writer_waits_for_room_until_an_area_is_added() -> None:
    world = full((2,), wait_ms=10_000)
    world.sim.notified()
    world.change(0, Op.WRITE, 16, 8)
    world.change(1, Op.WRITE, 24, 8)
    assert world.stores[0].waiting == 2
    assert world.disks[0].device.waits_for_room
    world.tick(9 * S)
    assert world.stores[0].waiting == 2
    world.grow(0, 1)
    assert waiting(world) == [Kind.COPY_READ]
    assert world.stores[0].waiting == 1
    world.grow(0, 1)
    assert world.stores[0].waiting == 0
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    assert not world.disks[0].device.waits_for_room
    end(world)


@pytest.mark.parametrize("units", [(), (1,)])
def test_a_storage_may_begin_with_nothing(units: tuple[int, ...]) -> None:
    world = full(units, wait_ms=5000)
    world.change(0, Op.WRITE, 80, 16)
    assert not world.ios
    for _ in range(2):
        world.grow(0, 1)
        complete_all(world)
    assert not world.requests
    assert statuses(world) == [ACTIVE]
    end(world)


def test_without_waiting_it_overflows_at_once() -> None:
    world = full((2,), (9,), wait_ms=0)
    world.change(0, Op.WRITE, 16, 8)
    assert statuses(world) == [OVERFLOWN, ACTIVE]
    complete_all(world)
    assert not world.requests
    end(world)


def test_after_the_limit_what_lacks_the_units_overflows_and_nothing_else() -> None:
    """Of three images of the full storage the oldest has the unit already, and other storages do not notice."""
    world = World(Shape(units=40, odd_sectors=0, storages=((3,), (40,))))
    world.set_room(0, 4000)
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    take(world, 0, trouble=None)
    take(world, 0, trouble=None)
    take(world, 0, store=1, trouble=None)
    for unit in (1, 2):
        world.change(0, Op.WRITE, 8 * unit, 8)
        complete_all(world)
    world.change(1, Op.WRITE, 0, 8)
    complete_all(world)
    world.tick(4 * S - 1)
    assert statuses(world) == [ACTIVE] * 4
    assert world.requests
    world.tick(1)
    assert statuses(world) == [ACTIVE, OVERFLOWN, OVERFLOWN, ACTIVE]
    complete_all(world)
    assert not world.requests
    end(world)


def test_each_full_storage_has_its_own_limit() -> None:
    world = full((1,), (1,), wait_ms=4000)
    world.set_room(1, 3000)
    world.change(0, Op.WRITE, 8, 8)
    complete_all(world)
    world.tick(4 * S - 1)
    assert statuses(world) == [ACTIVE] * 2
    world.tick(1)
    assert statuses(world) == [OVERFLOWN, ACTIVE]
    world.tick(3 * S - 1)
    assert statuses(world) == [OVERFLOWN, ACTIVE]
    assert world.requests
    world.tick(1)
    assert statuses(world) == [OVERFLOWN] * 2
    complete_all(world)
    assert not world.requests
    end(world)


def test_nobody_waits_any_more_when_waiting_is_given_up() -> None:
    world = full((1,), (40,), wait_ms=3_600_000)
    for queue in range(2):
        world.change(queue, Op.WRITE, 8 + 8 * queue, 8)
    complete_all(world)
    assert world.stores[0].waiting == 2
    world.set_room(0, 0)
    assert statuses(world) == [OVERFLOWN, ACTIVE]
    assert not world.stores[0].waiting
    complete_all(world)
    assert not world.requests
    end(world)


def test_who_waits_goes_on_when_the_chain_breaks() -> None:
    world = full((1,), wait_ms=3_600_000, images=2)
    for queue in range(2):
        world.change(queue, Op.WRITE, 8 + 8 * queue, 8)
    world.forsake(0)
    assert world.stores[0].waiting == 2
    world.forsake(1)
    assert waiting(world) == [Kind.CHANGE] * 2
    end(world)


def test_places_that_are_given_back_are_room() -> None:
    """An image is written to; a write of zeroes gives the place back that somebody waits for."""
    world = World(Shape(units=40, odd_sectors=0, storages=((9,),)))
    take(world, 0, trouble=None)
    world.set_room(0, 60_000)
    world.write_image(0, Op.WRITE, 0, 8)
    complete_all(world)
    for unit in range(1, 9):
        world.change(0, Op.WRITE, 8 * unit, 8)
        complete_all(world)
    world.change(0, Op.WRITE, 160, 8)
    assert world.stores[0].waiting == 1
    world.write_image(0, Op.WRITE_ZEROES, 0, 8)
    complete_all(world)
    assert not world.requests
    assert statuses(world) == [ACTIVE]
    end(world)


def test_the_oldest_goes_and_the_writer_that_waits_goes_on() -> None:
    """Without the gate, which could not be drained: that is how the oldest snapshot is evicted."""
    world = World(Shape(units=40, odd_sectors=0, storages=((2,),)))
    world.set_room(0, 3_600_000)
    take(world, 0, trouble=None)
    for unit in range(2):
        world.change(0, Op.WRITE, 8 * unit, 8)
        complete_all(world)
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 80, 16)
    world.close_gate(0)
    assert not world.disks[0].device.drained
    assert world.disks[0].device.waits_for_room
    assert not world.evict(1)
    assert world.evict(0)
    world.hand_over()
    complete_all(world)
    assert not world.requests
    assert world.disks[0].device.drained
    assert statuses(world) == [ACTIVE]
    assert world.held[0].slots() == 2
    world.open_gate(0)
    end(world)


def test_one_that_others_need_is_evicted_in_the_midst_of_copies_and_reads() -> None:
    """What the oldest image reads through the one that goes is handed over, while writes and reads go on."""
    world = World(Shape(units=40, odd_sectors=0, storages=((100,),)), prompt=False)
    for first in (0, 2, 4):
        take(world, 0, trouble=None)
        world.change(0, Op.WRITE, 8 * first, 24)
        complete_all(world)
    for image in range(3):
        world.read_image(image, 0, 320)
    world.change(0, Op.WRITE, 0, 200)
    assert world.evict(1)
    world.change(1, Op.WRITE, 160, 160)
    world.complete(0)
    world.portion(0)
    world.read_image(0, 0, 320)
    complete_all(world)
    world.hand_over()
    assert statuses(world) == [ACTIVE, ACTIVE]
    end(world)


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_younger_image_breaks_while_one_goes_without_the_gate(order: str) -> None:
    """Then copies are for the one that goes, or for the next older one, which reads through it."""
    world = World(Shape(unit=512, units=65536 + 200, odd_sectors=0, tracking_block=65536, storages=((40,),)))
    for _ in range(3):
        take(world, 0, trouble=None)
    old, going, young = world.held
    device = world.disks[0].device
    device.prepare_drop(going.image)
    if order == "before":
        world.forsake(2)
        world.change(0, Op.WRITE, 0, 1)
    needs_gate = device.begin_drop()
    assert needs_gate == (order == "before")
    world.held.remove(going)
    world.gone.append(going)
    world.settling.append(going)
    if needs_gate:
        world.close_gate(0)
        assert not device.drained
        complete_all(world)
    else:
        world.forsaken.add(young.serial)
        young.image.break_(ImageStatus.CORRUPTED, errno.ECANCELED)
    device.drop_now()
    world.open_gate(0)
    world.change(0, Op.WRITE, 65600, 1)
    world.portion(0)
    complete_all(world)
    world.change(1, Op.WRITE, 0, 1)
    complete_all(world)
    world.hand_over()
    assert old.active
    assert old.slots() == 2
    world.read_image(0, 0, 8)
    complete_all(world)
    end(world)


def test_an_image_that_was_to_go_and_stays_gets_no_copies() -> None:
    """Its gate could not be drained: it is gone for its readers, and goes later."""
    world = World(Shape(units=40, odd_sectors=0, storages=((40,),)))
    for _ in range(2):
        take(world, 0, trouble=None)
    device = world.disks[0].device
    world.change(0, Op.WRITE, 0, 8)
    held = world.held.pop()
    world.gone.append(held)
    world.settling.append(held)
    device.prepare_drop(held.image)
    assert device.begin_drop()
    device.cancel()
    world.change(0, Op.WRITE, 8, 8)
    complete_all(world)
    assert [world.held[0].has(unit) for unit in range(2)] == [False, True]
    assert [held.has(unit) for unit in range(2)] == [True, False]
    world.close_gate(0)
    device.prepare_drop(held.image)
    assert device.begin_drop()
    world.sim.switch([device], [None], settle=False)
    world.hand_over()
    assert world.held[0].slots() == 2
    end(world)


def test_other_waiting_does_not_count() -> None:
    """Who has waited for map memory has not yet waited for room."""
    world = World(Shape(units=40, odd_sectors=0, storages=((),), map_memory=False))
    world.set_room(0, 4000)
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    world.tick(MAP_LIMIT_NS - 1)
    world.feed()
    world.tick(1)
    assert world.stores[0].waiting == 1
    assert statuses(world) == [ACTIVE]
    world.tick(4 * S)
    assert statuses(world) == [OVERFLOWN]
    end(world)


def test_room_in_one_storage_while_the_other_is_waited_for() -> None:
    """A write that needs both waits for one of them, whichever; meanwhile others use what there is."""
    world = full((1,), (1,), wait_ms=60_000)
    world.set_room(1, 60_000)
    world.change(0, Op.WRITE, 80, 8)
    assert [store.waiting for store in world.stores] == [1, 0]
    world.grow(0, 1)
    complete_all(world)
    assert [store.waiting for store in world.stores] == [0, 1]
    world.grow(1, 1)
    complete_all(world)
    assert not world.requests
    assert statuses(world) == [ACTIVE] * 2
    end(world)


# ---- little room ----


@pytest.mark.parametrize("again", ["set", "area"])
def test_little_room_is_told_once(again: str) -> None:
    world = World(Shape(units=40, odd_sectors=0, storages=((10,),)))
    take(world, 0, trouble=None)
    world.set_room(0, 0, low=5)
    heard = []
    for unit in range(10):
        world.change(0, Op.WRITE, 8 * unit, 8)
        heard.append(world.told_in_step)
        complete_all(world)
    assert heard == [0] * 5 + [1] + [0] * 4
    if again == "set":
        world.grow(0, 3)
        world.set_room(0, 0, low=4)
    else:
        world.grow(0, 4)
    world.change(0, Op.WRITE, 80, 8)
    assert world.told_in_step == 1
    world.change(1, Op.WRITE, 88, 8)
    assert world.told_in_step == 0
    end(world)


def test_little_room_after_a_write_to_an_image_is_told() -> None:
    world = World(Shape(units=40, odd_sectors=0, storages=((10,),)))
    take(world, 0, trouble=None)
    world.set_room(0, 0, low=10)
    world.write_image(0, Op.WRITE, 0, 8)
    assert world.told_in_step == 1
    end(world)


# ---- writes to images ----


def written_full(wait_ms: int) -> World:
    """A write to an image finds only the places that are left to copies."""
    world = World(Shape(units=40, odd_sectors=0, storages=((8,), (8,))))
    take(world, 0, trouble=None)
    world.set_room(0, wait_ms)
    world.write_image(0, Op.WRITE, 0, 56)
    complete_all(world)
    assert world.stores[0].unused == 1
    return world


def test_writes_to_images_wait_for_room_as_copies_do() -> None:
    world = written_full(wait_ms=10_000)
    first = world.write_image(0, Op.WRITE, 80, 8)
    assert first
    assert world.stores[0].waiting == 1
    assert not world.disks[0].device.waits_for_room
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    assert world.stores[0].waiting == 1
    world.grow(0, 3)
    complete_all(world)
    assert first.result == 4096
    second = world.write_image(0, Op.WRITE, 160, 64)
    complete_all(world)
    world.tick(10 * S)
    complete_all(world)
    assert second
    assert second.result == -errno.ENOSPC
    assert statuses(world) == [ACTIVE]
    end(world)


@pytest.mark.parametrize("how", ["no more waiting", "broken", "dropped"])
def test_a_write_to_an_image_that_waits_for_room_ends(how: str) -> None:
    world = written_full(wait_ms=3_600_000)
    request = world.write_image(0, Op.WRITE, 80, 8)
    assert request
    assert world.stores[0].waiting == 1
    if how == "no more waiting":
        world.set_room(0, 0)
    elif how == "broken":
        world.forsake(0)
    else:
        world.close_gate(0)
        assert world.drop(0)
        world.hand_over()
        world.open_gate(0)
    assert not world.stores[0].waiting
    assert request.result == (-errno.ENOSPC if how == "no more waiting" else -errno.EIO)
    end(world)
