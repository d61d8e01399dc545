# SPDX-License-Identifier: MIT
"""Death breaks off the drop of an image, in the midst of handing over what older ones need of its map.

The image that goes and its older neighbour have tables and leaves in common from then on, until it has gone.
"""

from __future__ import annotations

from threading import Thread

import pytest

from tests.unit.sim.death import die
from tests.unit.sim.ending import end, preserved, swept
from tests.unit.sim.look import ACTIVE, statuses
from tests.unit.sim.scenarios import take
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

OWN = [range(0), range(3, 5)]
"""Units of the oldest image: with none of its own, its table is that of the one that goes."""

UNITS = [range(2), range(64, 66), range(130, 132)]
"""Of the youngest: in a leaf that the oldest may have, in one that both have in common, in one that neither has."""

GOING = range(70, 72)


def broken_off(own: range, units: range) -> World:
    """Of three images the second is going, the third is about to; what a successor finds, its sweep over."""
    world = World(Shape(units=200))
    take(world, 0, trouble=None)
    preserved(world, own)
    take(world, 0, trouble=None)
    preserved(world, GOING)
    take(world, 0, trouble=None)
    preserved(world, units)
    world.close_gate(0)
    assert world.drop(1)
    world.portion(0)
    successor(world)
    assert world.drop(1)
    return world


def successor(world: World) -> None:
    """Death, and its gate closed once more."""
    die(world, [])
    swept(world)
    assert statuses(world) == [ACTIVE] * len(world.held)
    world.close_gate(0)


def test_what_was_going_goes_before_anything_older() -> None:
    """Its map and that of its older neighbour have a leaf in common; what that one hands on must not be freed."""
    world = World(Shape(units=200))
    for leaf in range(3):
        take(world, 0, trouble=None)
        preserved(world, range(64 * leaf, 64 * leaf + 2))
    world.close_gate(0)
    assert world.drop(2)
    world.portion(0)
    die(world, [])
    swept(world)
    world.close_gate(0)
    with pytest.raises(OSError, match="busy"):
        world.disks[0].device.prepare_drop(world.held[1].image)
    assert not world.drop(1)
    assert world.drop_again(0)
    world.hand_over()
    assert world.drop(1)
    world.hand_over()
    world.open_gate(0)
    preserved(world, range(10, 60, 5))
    assert statuses(world) == [ACTIVE]
    end(world)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("own", OWN)
def test_what_it_is_given_is_counted_for_its_older_neighbour_too(own: range, units: range) -> None:
    world = broken_off(own, units)
    world.hand_over()
    assert world.drop_again(0)
    world.hand_over()
    assert world.held[0].slots() == len({*own, *GOING, *units})
    end(world)


def test_nobody_adds_leaves_to_the_older_neighbour_meanwhile() -> None:
    """A writer and the hand-over would each put a leaf of its own into the table that is common to both maps."""
    world = broken_off(range(0), range(130, 132))
    hand_over = Thread(target=world.portion, args=(0,))
    with world.sim.map_locked(world.held[0].image):
        hand_over.start()
        hand_over.join(0.2)
        assert hand_over.is_alive(), "it does not wait for who adds leaves"
    hand_over.join()
    world.hand_over()
    assert world.drop_again(0)
    world.hand_over()
    world.open_gate(0)
    preserved(world, range(190, 192))
    end(world)
