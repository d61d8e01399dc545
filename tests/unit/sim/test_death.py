# SPDX-License-Identifier: MIT
"""The process dies with I/O under way, and its successor goes on with what outlives it."""

from __future__ import annotations

import errno
import itertools

import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.death import die
from tests.unit.sim.ending import complete_all, end, recover
from tests.unit.sim.look import find, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World


@pytest.mark.parametrize("order", [*itertools.permutations(range(3)), (), (1,)])
@pytest.mark.parametrize("zero_copy", [True, False])
def test_requests_in_flight_end_once_whatever_lands(order: tuple[int, ...], zero_copy: bool) -> None:
    world = World(Shape(zero_copy=zero_copy))
    first = world.change(0, Op.WRITE, 0, 16)
    second = world.change(1, Op.WRITE, 8, 16)
    zeroes = world.change(0, Op.WRITE_ZEROES, 12, 8)
    world.read(1, 0, 24)
    world.flush(0)
    assert waiting(world) == [Kind.CHANGE] * 3 + [Kind.READ, Kind.FLUSH]
    left = [0, 1, 2]
    landing = []
    for wanted in order:
        landing.append(left.index(wanted))
        left.remove(wanted)
    assert len(die(world, landing)) == 3 - len(order)
    assert sorted(kind.name for kind in waiting(world)) == ["CHANGE", "CHANGE", "CHANGE", "FLUSH", "READ"]
    assert first
    assert second
    assert zeroes
    assert set(world.requests) >= {first.id, second.id, zeroes.id}
    complete_all(world)
    end(world)


def test_what_was_marked_stays_marked() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 8, 8)
    complete_all(world)
    world.change(0, Op.WRITE, 24, 8)
    assert waiting(world) == [Kind.COPY_READ]
    world.change(0, Op.DISCARD, 40, 8)
    die(world, [])
    assert world.disks[0].interval.bitmap[0] == 0b101010
    assert waiting(world) == [Kind.COPY_READ], "its image lives on"
    complete_all(world)
    end(world)


def test_a_change_that_waits_at_the_gate_goes_on() -> None:
    """The gate is private: whoever closed it begins anew."""
    world = World(Shape(disks=2))
    world.close_gate(0)
    world.change(0, Op.WRITE, 0, 8)
    assert waiting(world) == []
    die(world, [])
    assert waiting(world) == [Kind.CHANGE]
    complete_all(world)
    end(world)


def test_swallowed_trims_are_sent_by_the_successor() -> None:
    world = World(Shape())
    disk = world.disks[0]
    take(world, 0, trouble=None)
    world.change(0, Op.DISCARD, 0, 24)
    complete_all(world)
    die(world, [])
    world.change(0, Op.WRITE, 8, 8)
    complete_all(world)
    recover(world)
    world.close_gate(0)
    assert world.drop(0)
    world.hand_over()
    assert world.replay(0, 1 << 20)
    assert world.replay(0, 1 << 20)
    assert not world.replay(0, 1 << 20)
    assert not disk.words[:8].any()
    assert disk.words[8:16].all(), "what was overwritten since then stays"
    assert not disk.words[16:24].any()
    end(world)


def test_why_an_image_broke_outlives_the_process() -> None:
    world = World(Shape(storages=((1,),)))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 16)
    complete_all(world)
    assert statuses(world) == [(ImageStatus.OVERFLOWN, errno.ENOSPC)]
    die(world, [])
    assert statuses(world) == [(ImageStatus.OVERFLOWN, errno.ENOSPC)]
    end(world)


def test_the_model_sees_an_old_write_that_lands_after_the_barrier() -> None:
    world = World(Shape())
    world.change(0, Op.WRITE, 0, 8)
    [late] = die(world, [])
    complete_all(world)
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    late.land()
    with pytest.raises(AssertionError, match="sector 0 holds"):
        world.disks[0].check()


def test_dying_again_and_again() -> None:
    world = World(Shape(zero_copy=False))
    world.change(0, Op.WRITE, 0, 16)
    for number in range(5):
        take(world, 0, trouble=None)
        world.change(1, Op.WRITE, 4 * number, 9)
        world.read_image(0, 0, 40)
        world.complete(find(world, Kind.COPY_READ) if Kind.COPY_READ in waiting(world) else 0)
        die(world, [number])
    complete_all(world)
    end(world)
