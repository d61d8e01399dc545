# SPDX-License-Identifier: MIT
"""What requests wait for, and how the waiting ends: claims, buffers, copies, map memory, storages that never answer."""

from __future__ import annotations

import errno

import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.ending import complete_all, end, origins_win
from tests.unit.sim.judge import COPY_LIMIT_NS, MAP_LIMIT_NS
from tests.unit.sim.look import ACTIVE, find, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World


def test_a_second_write_waits_for_the_first_ones_copy() -> None:
    world = World(Shape(), prompt=False)
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    world.change(1, Op.WRITE, 4, 8)
    # the unit that nobody has claimed is copied meanwhile
    assert waiting(world) == [Kind.COPY_READ, Kind.COPY_READ]
    for _ in range(4):
        world.complete(1)
        if waiting(world) == [Kind.COPY_READ]:
            break
    world.run()
    assert waiting(world) == [Kind.COPY_READ]
    complete_all(world)
    assert world.held[0].image.preserved == 8192
    end(world)


@pytest.mark.parametrize("result", [-errno.EAGAIN, -errno.EINTR, 511])
def test_repeating_ends(result: int) -> None:
    """EAGAIN, EINTR or too little to go on from, for ever, is EIO."""
    world = World(Shape())
    data = bytearray(4096)
    world.sim.request(world.device_queues[0], Op.WRITE, 0, 0, 4096, data)
    for _ in range(1001):
        [io] = world.sim.started()
        assert (io.offset, io.length) == (0, 4096)
        world.sim.complete(io.id, result)
    assert [ended.result for ended in world.sim.results()] == [-errno.EIO]
    assert not world.sim.started()


def test_a_late_copy_only_frees() -> None:
    """It ends when its snapshot is broken, the unit overwritten, and a younger snapshot of the same storage taken."""
    world = World(Shape())
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    world.complete(0)
    world.tick(COPY_LIMIT_NS)
    assert statuses(world) == [(ImageStatus.CORRUPTED, errno.ETIMEDOUT)]
    world.complete(find(world, Kind.CHANGE))
    world.close_gate(0)
    assert world.take([0], 0)
    world.open_gate(0)
    world.complete(find(world, Kind.COPY_WRITE))
    assert not world.held[1].has(0)
    world.change(0, Op.WRITE, 8, 8)
    complete_all(world)
    assert statuses(world)[1] == ACTIVE
    end(world)


def test_a_copy_is_given_up_while_it_waits_for_a_buffer() -> None:
    world = World(Shape(unit=65536, units=40, odd_sectors=0, tracking_block=65536, threads=1, queues=2))
    take(world, 0, trouble=None)
    for number in range(2):
        world.change(number, Op.WRITE, number * 2048, 2048)
    world.complete(0)
    # the first one's copy has all of the half of the pool
    assert waiting(world) == [Kind.COPY_WRITE]
    assert world.sim.pool_used(world.threads[0]) == 1 << 20
    world.tick(COPY_LIMIT_NS)
    assert waiting(world) == [Kind.COPY_WRITE, Kind.CHANGE, Kind.CHANGE]
    complete_all(world)
    end(world)


def test_a_copy_is_given_up_that_waits_for_a_buffer_behind_an_image_read() -> None:
    world = World(Shape(unit=65536, units=60, odd_sectors=0, tracking_block=65536, threads=1, queues=1))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 128)
    complete_all(world)
    world.change(0, Op.WRITE, 128, 2048)
    world.complete(0)
    world.read_image(0, 0, 128)
    world.change(0, Op.WRITE, 4096, 128)
    assert waiting(world) == [Kind.COPY_WRITE]
    world.tick(COPY_LIMIT_NS)
    assert waiting(world) == [Kind.COPY_WRITE, Kind.CHANGE, Kind.CHANGE]
    complete_all(world)
    assert not world.requests
    end(world)


def test_an_image_read_of_more_pieces_than_a_queue_has() -> None:
    world = World(Shape(units=80, depth=2, queues=1))
    take(world, 0, trouble=None)
    for unit in range(0, 80, 2):
        world.change(0, Op.WRITE, unit * 8, 8)
        complete_all(world)
    for _ in range(2):  # the device has been at rest for a while
        world.read_image(0, 0, 8)
        complete_all(world)
        world.tick(10**9)
    for _ in range(2):
        world.read_image(0, 0, 1000)
    assert len(world.ios) == 20
    complete_all(world)
    assert not world.requests
    end(world)


def test_an_error_ends_an_image_read_of_many_pieces() -> None:
    world = World(Shape(units=80, depth=2, queues=1))
    take(world, 0, trouble=None)
    for unit in range(0, 80, 2):
        world.change(0, Op.WRITE, unit * 8, 8)
        complete_all(world)
    for _ in range(2):
        world.read_image(0, 0, 1000)
    world.complete(find(world, Kind.IMAGE_FROM_ORIGIN), error=errno.EIO)
    complete_all(world)
    assert not world.requests
    assert statuses(world) == [ACTIVE]
    end(world)


def test_what_waits_for_a_buffer_gets_one_in_turn() -> None:
    world = World(Shape(unit=65536, units=60, odd_sectors=1, tracking_block=65536, threads=1, zero_copy=False, depth=8))
    take(world, 0, trouble=None)
    for number in range(6):
        world.change(number, Op.WRITE, number * 1024 + number % 2, 2048)
        world.read_image(0, number * 512, 2048)
        world.read(number, number * 512, 2048)
    assert len(world.ios) < 18
    complete_all(world)
    assert not world.requests
    assert statuses(world) == [ACTIVE]
    end(world)


def test_silent_storage_holds_three_quarters_of_the_copies_and_no_writer() -> None:
    world = World(Shape(units=60, depth=2, queues=1, storages=((1,) * 60, (60,))))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 1000)
    world.change(0, Op.WRITE, 400, 8)
    origins_win(world)
    assert statuses(world)[0] == (ImageStatus.CORRUPTED, errno.ETIMEDOUT)
    # Another storage answers, and three quarters of the copies are the most that this one can hold.
    assert waiting(world) == [Kind.COPY_WRITE] * 15
    world.close_gate(0)
    assert world.take([0], 1)
    world.open_gate(0)
    world.change(0, Op.WRITE, 0, 8)
    world.complete(find(world, Kind.COPY_READ))
    assert waiting(world) == [Kind.COPY_WRITE] * 16
    world.complete(15)
    assert waiting(world) == [Kind.COPY_WRITE] * 15 + [Kind.CHANGE]
    assert statuses(world)[1] == ACTIVE
    # It answers at last: everything works again.
    complete_all(world)
    take(world, 0, store=1, trouble=None)
    world.change(0, Op.WRITE, 0, 16)
    complete_all(world)
    assert statuses(world)[2] == ACTIVE
    end(world)


def test_two_silent_storages_hold_all_copies_and_no_writer() -> None:
    world = World(Shape(units=60, depth=2, queues=1, storages=((1,) * 60, (1,) * 60, (60,))))
    for store in range(2):
        world.close_gate(0)
        assert world.take([0], store)
        world.open_gate(0)
        world.change(0, Op.WRITE, 0, 1000)
        origins_win(world)
    assert waiting(world) == [Kind.COPY_WRITE] * 20
    world.close_gate(0)
    assert world.take([0], 2)
    world.open_gate(0)
    world.change(0, Op.WRITE, 0, 8)
    world.tick(COPY_LIMIT_NS - 1)
    assert waiting(world) == [Kind.COPY_WRITE] * 20
    assert statuses(world)[2] == ACTIVE
    world.tick(1)
    assert statuses(world)[2] == (ImageStatus.CORRUPTED, errno.ETIMEDOUT)
    assert waiting(world) == [Kind.COPY_WRITE] * 20 + [Kind.CHANGE]
    complete_all(world)
    end(world)


def test_a_write_that_waits_for_a_copy_goes_on_when_one_is_free() -> None:
    world = World(Shape(units=60, depth=2, queues=1, storages=((1,) * 60, (60,))))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 1000)
    world.change(0, Op.WRITE, 400, 8)
    complete_all(world)
    assert not world.requests
    assert statuses(world) == [ACTIVE]
    end(world)


def test_map_memory_is_waited_for() -> None:
    world = World(Shape(map_memory=False))
    take(world, 0, trouble=None)
    for queue in range(2):
        world.change(queue, Op.WRITE, 8 * queue, 8)
        assert world.told_in_step
    assert not world.ios
    world.tick(MAP_LIMIT_NS - 1)
    assert not world.ios
    world.feed()
    world.tick(1)
    assert waiting(world) == [Kind.COPY_READ, Kind.COPY_READ]
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    end(world)


def test_map_memory_that_never_comes_breaks_the_image() -> None:
    world = World(Shape(map_memory=False))
    take(world, 0, trouble=None)
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    world.tick(MAP_LIMIT_NS)
    assert waiting(world) == [Kind.CHANGE]
    assert statuses(world) == [(ImageStatus.CORRUPTED, errno.ENOMEM)] * 2
    end(world)


def test_a_request_larger_than_the_pool_allows() -> None:
    world = World(Shape(units=600, zero_copy=False))
    data = bytearray((1 << 20) + 4096)
    world.sim.request(world.device_queues[0], Op.READ, 0, 0, len(data), data)
    assert [ended.result for ended in world.sim.results()] == [-errno.EINVAL]
    end(world)
