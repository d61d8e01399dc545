# SPDX-License-Identifier: MIT
"""Two deaths before the quarantine ends: what the first sweep knows to be nobody's is not lost for the second one."""

from __future__ import annotations

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.death import die
from tests.unit.sim.ending import complete_all, end, preserved, swept
from tests.unit.sim.look import ACTIVE, find, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.torn import Cut
from tests.unit.sim.world import World

UNPUBLISHED = Cut(write=0, published=0, recorded=100)


def younger_goes(world: World) -> None:
    """The youngest image, and all that it had."""
    world.close_gate(0)
    assert world.drop(len(world.held) - 1)
    world.hand_over()
    world.open_gate(0)
    assert not world.gone


def test_a_copy_that_was_made_again() -> None:
    world = World(Shape())
    for _ in range(2):
        take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    world.complete(find(world, Kind.COPY_READ))
    assert waiting(world) == [Kind.COPY_WRITE]
    die(world, [], UNPUBLISHED)
    complete_all(world)
    swept(world)
    younger_goes(world)
    die(world, [])
    swept(world)
    assert statuses(world) == [ACTIVE]
    end(world)


def test_what_a_write_to_an_image_replaced() -> None:
    world = World(Shape())
    for _ in range(2):
        take(world, 0, trouble=None)
    world.write_image(1, Op.WRITE, 0, 8)
    complete_all(world)
    world.write_image(1, Op.WRITE, 0, 8)
    assert waiting(world) == [Kind.IMAGE_WRITE]
    die(world, [], Cut(write=0, published=1, recorded=1, kept=True))
    swept(world)
    complete_all(world)
    younger_goes(world)
    die(world, [])
    swept(world)
    assert statuses(world) == [ACTIVE]
    end(world)


def test_what_was_lost_breaks_nothing_that_is_taken_later() -> None:
    """A record of nobody: whatever image may have lacked its unit is broken. Later ones never had it."""
    world = World(Shape())
    take(world, 0, trouble=None)
    take(world, 0, trouble=None)
    preserved(world, range(1))
    record = world.stores[0].record(0).copy()
    younger_goes(world)
    younger_goes(world)
    take(world, 0, trouble=None)

    def flip(world: World) -> None:
        world.stores[0].record(0)[:] = record

    die(world, [], None, flip)
    swept(world)
    assert statuses(world) == [(ImageStatus.CORRUPTED, 74)]
    take(world, 0, trouble=None)
    die(world, [])
    swept(world)
    assert statuses(world) == [(ImageStatus.CORRUPTED, 74), ACTIVE]
    end(world)
