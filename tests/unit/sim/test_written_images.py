# SPDX-License-Identifier: MIT
"""Writing to images: each rule with the shortest story that shows it. The world checks the contents by itself."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.disk import Request
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.held import Held
from tests.unit.sim.interval import Interval
from tests.unit.sim.judge import COPY_LIMIT_NS, MAP_LIMIT_NS
from tests.unit.sim.look import ACTIVE, find, io_of, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World


def marked(interval: Interval) -> list[int]:
    return [int(block) for block in np.flatnonzero(np.unpackbits(interval.bitmap, bitorder="little"))]


def result_of(world: World, request: Request | None) -> int | None:
    """What a request ends with when everything completes."""
    assert request
    complete_all(world)
    return request.result


def shows(world: World, image: int, sector: int) -> int:
    """The first word of a sector of a held image, read through its queue."""
    request = world.read_image(image, sector, 1)
    complete_all(world)
    assert request
    assert request.data is not None
    return int(request.data[0, 0])


@pytest.mark.parametrize("zero_copy", [True, False])
def test_the_order_of_a_write_to_a_part_of_a_unit(zero_copy: bool) -> None:
    world = World(Shape(zero_copy=zero_copy))
    take(world, 0, trouble=None)
    held = world.held[0]
    world.write_image(0, Op.WRITE, 6, 20)
    # the first and the last of four units are written in part: what else they hold is read before
    for start in (0, 24):
        assert waiting(world) == [Kind.IMAGE_FROM_ORIGIN]
        assert io_of(world, Kind.IMAGE_FROM_ORIGIN).offset == start * 512
        assert marked(held.intervals[1]) == [0, 1, 2, 3]
        world.complete(0)
    assert waiting(world) == [Kind.IMAGE_WRITE]
    assert io_of(world, Kind.IMAGE_WRITE).length == 4 * 4096
    assert not held.image.written
    world.complete(0)
    assert not world.ios
    assert (held.image.written, held.image.preserved, world.stores[0].used) == (4 * 4096, 0, 4)
    assert not held.has(0)
    end(world)


def test_old_data_that_an_origin_write_overtakes_is_read_again() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    world.write_image(0, Op.WRITE, 2, 3)
    assert waiting(world) == [Kind.IMAGE_FROM_ORIGIN]
    world.change(0, Op.WRITE, 0, 8)
    for _ in range(3):
        world.complete(1)
    world.complete(find(world, Kind.IMAGE_FROM_ORIGIN))
    assert waiting(world) == [Kind.IMAGE_FROM_STORAGE]
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    end(world)


def test_what_overlaps_a_write_waits_for_it() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    world.write_image(0, Op.WRITE, 0, 16)
    complete_all(world)
    world.read_image(0, 0, 8)
    world.write_image(0, Op.WRITE, 1, 1)
    world.write_image(0, Op.WRITE, 14, 2)
    world.write_image(0, Op.WRITE_ZEROES, 0, 24)
    world.read_image(0, 7, 1)
    world.read_image(0, 32, 8)
    assert waiting(world) == [Kind.IMAGE_FROM_STORAGE, Kind.IMAGE_FROM_STORAGE, Kind.IMAGE_FROM_ORIGIN]
    world.complete(0)
    assert waiting(world) == [Kind.IMAGE_FROM_STORAGE, Kind.IMAGE_FROM_ORIGIN, Kind.IMAGE_FROM_STORAGE]
    complete_all(world)
    assert shows(world, 0, 7) == 0
    assert world.stores[0].used == 0, "zeroes of whole units need no place"
    end(world)


def test_images_of_one_instant_do_not_see_each_others_writes() -> None:
    world = World(Shape())
    disk = world.disks[0]
    was = int(disk.words[0, 0])
    world.close_gate(0)
    for _ in range(3):
        assert world.take([0], 0)
    world.open_gate(0)
    world.write_image(1, Op.WRITE, 0, 8)
    complete_all(world)
    assert [shows(world, image, 0) == was for image in range(3)] == [True, False, True]
    assert disk.words[0, 0] == was
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    assert [shows(world, image, 0) == was for image in range(3)] == [True, False, True]
    world.close_gate(0)
    assert world.drop(1)
    world.hand_over()
    world.open_gate(0)
    assert [shows(world, image, 0) == was for image in range(2)] == [True, True]
    end(world)


def test_a_write_marks_the_intervals_before_and_after_its_image() -> None:
    world = World(Shape(tracking_block=8192, units=20))
    for _ in range(3):
        take(world, 0, trouble=None)
    intervals = [world.held[0].intervals[0], *(held.intervals[1] for held in world.held)]
    world.write_image(1, Op.WRITE, 15, 2)
    world.write_image(1, Op.WRITE_ZEROES, 64, 16)
    complete_all(world)
    assert [marked(interval) for interval in intervals] == [[], [0, 1, 4], [0, 1, 4], []]
    world.write_image(2, Op.WRITE, 100, 1)
    complete_all(world)
    assert [marked(interval) for interval in intervals] == [[], [0, 1, 4], [0, 1, 4, 6], [6]]
    assert world.disks[0].interval is intervals[3]
    end(world)


def test_what_is_replaced_gives_its_places_back() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    for start, sectors, used in ((0, 40, 5), (3, 30, 5), (8, 8, 5), (1, 1, 5)):
        world.write_image(0, Op.WRITE, start, sectors)
        complete_all(world)
        assert world.stores[0].used == used
    world.write_image(0, Op.WRITE_ZEROES, 4, 24)
    complete_all(world)
    assert world.stores[0].used == 3  # the first and the last are zero in part
    assert world.held[0].image.written == 5 * 4096
    end(world)


def test_writes_leave_room_for_copies() -> None:
    world = World(Shape(storages=((16,),), units=30))
    take(world, 0, trouble=None)
    assert result_of(world, world.write_image(0, Op.WRITE, 0, 13 * 8)) == 13 * 4096
    was = shows(world, 0, 13 * 8), shows(world, 0, 14 * 8)
    assert result_of(world, world.write_image(0, Op.WRITE, 13 * 8, 16)) == -errno.ENOSPC
    assert world.stores[0].unused == 2
    assert shows(world, 0, 13 * 8) != was[0], "one unit had room"
    assert shows(world, 0, 14 * 8) == was[1]
    world.change(0, Op.WRITE, 0, 16)
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    assert world.stores[0].unused == 0
    assert result_of(world, world.write_image(0, Op.WRITE_ZEROES, 16, 8)) == 0, "zeroes of whole units need no room"
    world.change(0, Op.WRITE, 16, 16)
    complete_all(world)
    assert statuses(world) == [(ImageStatus.OVERFLOWN, errno.ENOSPC)]
    end(world)


@pytest.mark.parametrize("moved", [False, True], ids=["nothing moved", "data moved"])
def test_a_storage_that_fails_fails_the_write_alone(moved: bool) -> None:
    world = World(Shape(storages=((2, 100),)))
    take(world, 0, trouble=None)
    was = [shows(world, 0, sector) for sector in (0, 16)]
    request = world.write_image(0, Op.WRITE, 0, 32)
    assert request
    world.complete(0)  # the two places of the first area
    assert waiting(world) == [Kind.IMAGE_WRITE]
    if moved:
        world.apply(0)
    world.complete(0, error=errno.EREMOTEIO)
    assert request.result == -errno.EREMOTEIO
    assert statuses(world) == [ACTIVE]
    assert [shows(world, 0, sector) == old for sector, old in zip((0, 16), was, strict=True)] == [False, True]
    assert world.stores[0].used == 2
    end(world)


def test_a_part_of_an_unreadable_unit_cannot_be_written_all_of_it_can() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    world.complete(0, error=errno.EIO)
    complete_all(world)
    assert 0 in world.held[0].unreadable
    for start, sectors, result in ((1, 2, -errno.EIO), (0, 8, 4096), (1, 2, 1024)):
        assert result_of(world, world.write_image(0, Op.WRITE, start, sectors)) == result
    world.read_image(0, 0, 8)
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    end(world)


def test_old_data_that_is_damaged_breaks_the_image() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    world.damage(0, 0)
    assert result_of(world, world.write_image(0, Op.WRITE, 1, 2)) == -errno.EIO
    assert statuses(world) == [(ImageStatus.CORRUPTED, errno.EBADMSG)]
    end(world)


@pytest.mark.parametrize("read_only", [True, False], ids=["while old data is read", "while it is stored"])
@pytest.mark.parametrize("breaks", [True, False], ids=["broken", "dropped"])
def test_an_image_that_breaks_or_goes_under_a_write(breaks: bool, read_only: bool) -> None:
    world = World(Shape(storages=((3, 1),), units=20))
    take(world, 0, trouble=None)
    world.write_image(0, Op.WRITE, 1, 4)
    if not read_only:
        world.complete(0)
    assert waiting(world) == [Kind.IMAGE_FROM_ORIGIN if read_only else Kind.IMAGE_WRITE]
    if breaks:
        world.change(0, Op.WRITE, 0, 80)
        world.tick(COPY_LIMIT_NS)
        complete_all(world)
        assert statuses(world)[0][0] is not ImageStatus.ACTIVE
        world.write_image(0, Op.WRITE, 80, 8)
        world.write_image(0, Op.WRITE_ZEROES, 80, 8)
        assert not world.ios
    else:
        world.close_gate(0)
        assert world.drop(0)
        world.hand_over()
        world.write_image(0, Op.WRITE, 80, 8)
        assert len(world.ios) == 1
        complete_all(world)
        world.open_gate(0)
    assert not world.requests
    assert world.stores[0].used == 0 or breaks
    end(world)


@pytest.mark.parametrize("comes", [True, False])
@pytest.mark.parametrize("op", [Op.WRITE, Op.WRITE_ZEROES])
def test_a_write_waits_for_map_memory_and_not_for_ever(op: Op, comes: bool) -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    world.starve(0)
    request = world.write_image(0, op, 0, 8)
    world.tick(MAP_LIMIT_NS - 1)
    assert request in world.requests.values()
    assert not world.ios
    if comes:
        world.feed()
    world.tick(1)
    success = 4096 if op is Op.WRITE else 0
    assert result_of(world, request) == (success if comes else -errno.ENOSPC)
    assert world.held[0].image.written == (4096 if comes else 0)
    assert statuses(world) == [ACTIVE]
    end(world)


def test_data_that_cannot_be_fetched_for_an_image() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    world.fail_data()
    assert result_of(world, world.write_image(0, Op.WRITE, 0, 8)) == -errno.EFAULT
    assert not world.stores[0].used
    end(world)


def test_more_writes_than_a_queue_has_pieces() -> None:
    """And more than one portion each: a portion is one run of places, and not larger than a copy."""
    world = World(Shape(unit=512, units=600, odd_sectors=0, depth=12, pool=4 << 20, storages=((7, 300, 1000),)))
    take(world, 0, trouble=None)
    for number in range(12):
        world.write_image(0, Op.WRITE, number * 50, 50)
    complete_all(world)
    world.write_image(0, Op.WRITE, 10, 580)
    world.write_image(0, Op.WRITE_ZEROES, 0, 600)
    world.write_image(0, Op.WRITE, 300, 1)
    complete_all(world)
    assert world.stores[0].used == 1
    end(world)


def test_a_write_waits_for_a_buffer() -> None:
    world = World(Shape(unit=65536, units=60, odd_sectors=0, tracking_block=65536, threads=1))
    take(world, 0, trouble=None)
    for number in range(2):
        world.write_image(0, Op.WRITE, number * 2048, 2048)
    assert waiting(world) == [Kind.IMAGE_WRITE]
    assert world.sim.pool_used(world.threads[0]) == 1 << 20
    complete_all(world)
    assert not world.requests
    end(world)


def test_a_write_waits_for_a_piece() -> None:
    """A read of many pieces has them all."""
    world = World(Shape(units=80, depth=2, queues=1))
    take(world, 0, trouble=None)
    for unit in range(0, 70, 2):
        world.change(0, Op.WRITE, unit * 8, 8)
        complete_all(world)
    world.read_image(0, 0, 560)
    world.write_image(0, Op.WRITE, 600, 8)
    assert Kind.IMAGE_WRITE not in waiting(world)
    while Kind.IMAGE_WRITE not in waiting(world):
        world.complete(0)
    complete_all(world)
    assert not world.requests
    end(world)


def test_an_image_that_begins_no_interval() -> None:
    """The active bitmap is the one before it, and the one after it."""
    world = World(Shape())
    disk = world.disks[0]
    held = Held(world.sim, disk, world.stores[0], world.arena, 1000)
    disk.device.prepare_take(held.image)
    world.close_gate(0)
    world.sim.switch([disk.device], [None])
    world.open_gate(0)
    queue = world.sim.add_queue(world.threads[0], image=held.image, depth=1, zero_copy=True)
    with pytest.raises(OSError, match="queue") as caught:
        world.sim.add_queue(world.threads[0], image=held.image, depth=1, zero_copy=True)
    assert caught.value.errno == errno.EBUSY
    world.sim.request(queue, Op.WRITE_ZEROES, 0, 8192, 4096)
    assert [ended.result for ended in world.sim.results()] == [0]
    assert marked(disk.interval) == [2]
    disk.interval.touch(8192, 4096)
    world.sim.del_queue(queue)
    with engine.Arena() as arena:
        stranger = Held(world.sim, disk, world.stores[0], arena, 1001)
        with pytest.raises(OSError, match=r".+") as caught:
            disk.device.prepare_take(stranger.image)
        assert caught.value.errno == errno.EINVAL, "images of a chain share their map memory"
        stranger.image.close()
    disk.device.prepare_drop(held.image)
    world.close_gate(0)
    world.sim.switch([disk.device], [None])
    held.image.close()
    end(world)


@pytest.mark.parametrize("older", [(), (3,), (3, 65600)], ids=["no table", "one table", "both tables"])
def test_maps_of_more_than_one_table_are_handed_over(older: tuple[int, ...]) -> None:
    """65536 units belong to one table. What was written to the image that goes is not handed over."""
    world = World(Shape(unit=512, units=65536 + 300, odd_sectors=0, tracking_block=65536))
    take(world, 0, trouble=None)
    for unit in older:
        world.change(0, Op.WRITE, unit, 1)
    complete_all(world)
    take(world, 0, trouble=None)
    units = [0, 3, 100, 65535, 65536, 65600, 65700]
    for unit in units:
        world.change(0, Op.WRITE, unit, 1)
        complete_all(world)
    world.write_image(1, Op.WRITE, 65530, 9)
    complete_all(world)
    world.close_gate(0)
    assert world.drop(1)
    world.read_image(0, 65530, 200)
    world.portion(0)
    complete_all(world)
    world.hand_over()
    world.open_gate(0)
    assert all(world.held[0].has(unit) for unit in units)
    assert world.held[0].image.preserved == world.stores[0].storage.used == len(units) * 512
    world.read_image(0, 0, 2000)
    complete_all(world)
    end(world)
