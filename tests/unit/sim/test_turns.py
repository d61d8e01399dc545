# SPDX-License-Identifier: MIT
"""A storage that copies may fill at a limited rate: writers wait their turn, and nothing is lost."""

from __future__ import annotations

import pytest

from blksnap_ublk.engine.request import Op
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.judge import S
from tests.unit.sim.look import ACTIVE, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

MS = 1_000_000


def test_writers_wait_their_turn() -> None:
    """Copies of 8 KiB each, at 64 KiB in a second."""
    world = World(Shape(units=200, odd_sectors=0))
    take(world, 0, trouble=None)
    world.set_rate(0, 65536)
    for number in range(8):
        world.change(number, Op.WRITE, 16 * number, 16)
    # one at once, and what is saved up of it is less than another one
    assert len(waiting(world)) == 1
    complete_all(world)
    for left in range(6, -1, -1):
        world.pass_time(124 * MS)
        assert not world.ios or left == 6
        world.pass_time(MS)
        assert len(waiting(world)) == 1 or left == 6
        complete_all(world)
        assert len(world.requests) == left
    assert statuses(world) == [ACTIVE]
    end(world)


def test_a_tick_is_enough_for_who_waits_his_turn() -> None:
    world = World(Shape(units=200, odd_sectors=0))
    take(world, 0, trouble=None)
    world.set_rate(0, 4096)
    for number in range(4):
        world.change(number, Op.WRITE, 8 * number, 8)
    for _ in range(4):
        assert world.requests
        complete_all(world)
        world.tick(S)
    complete_all(world)
    assert not world.requests
    end(world)


@pytest.mark.parametrize("rate", [0, 1 << 30])
def test_a_rate_that_is_raised_counts_from_now(rate: int) -> None:
    world = World(Shape(units=200, odd_sectors=0))
    take(world, 0, trouble=None)
    world.set_rate(0, 1)
    for number in range(3):
        world.change(number, Op.WRITE, 8 * number, 8)
        complete_all(world)
    world.tick(100 * S)
    assert len(world.requests) == 2
    world.set_rate(0, rate)
    world.tick(S)
    complete_all(world)
    assert not world.requests
    end(world)


def test_a_copy_of_one_storage_does_not_wait_for_the_turn_of_another() -> None:
    world = World(Shape(units=200, odd_sectors=0, disks=2, storages=((200,), (200,))))
    take(world, 0, store=0, trouble=None)
    take(world, 1, store=1, trouble=None)
    world.set_rate(0, 1)
    for number in range(12):
        world.change(number, Op.WRITE, 8 * number, 8)
    complete_all(world)
    assert {world.disk_of_queue[request.queue].number for request in world.requests.values()} == {0}
    world.set_rate(0, 0)
    world.tick(S)
    complete_all(world)
    assert not world.requests
    end(world)


def test_nobody_waits_for_his_turn_behind_a_closed_gate() -> None:
    """Otherwise it would not be drained in time."""
    world = World(Shape(units=200, odd_sectors=0, queues=2))
    take(world, 0, trouble=None)
    world.set_rate(0, 1)
    for number in range(6):
        world.change(number, Op.WRITE, 8 * number, 8)
        complete_all(world)
    assert len(world.requests) == 5
    world.close_gate(0)
    complete_all(world)
    assert world.disks[0].device.drained
    assert not world.requests
    world.change(0, Op.WRITE, 800, 8)
    world.open_gate(0)
    assert not world.ios
    assert len(world.requests) == 1
    assert statuses(world) == [ACTIVE]
    end(world)
