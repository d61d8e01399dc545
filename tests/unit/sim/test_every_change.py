# SPDX-License-Identifier: MIT
"""Death between any two changes of the memory that outlives the process, in the midst of each kind of step.

Whatever it was about to do: its successor finds every image as it was, and loses no place. So does the one after it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial

import pytest

from blksnap_ublk.engine.request import Op
from tests.unit.sim.death import die
from tests.unit.sim.ending import complete_all, end, preserved, swept
from tests.unit.sim.look import ACTIVE, find, statuses
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.shared import dies
from tests.unit.sim.test_broken_off_drop import broken_off
from tests.unit.sim.torn import Cut, outliving
from tests.unit.sim.world import World

MOST = 100
"""Where a step makes more changes, it makes the same ones again and again."""

EACH = os.environ.get("BSU_ALL_CHANGES") == "1"
"""Otherwise the first ones are all taken, and of later ones fewer and fewer, by chance."""

Build = Callable[[], World]
Step = Callable[[World], object]


def killed_everywhere(build: Build, step: Step) -> int:
    """Dies before the first, second … n-th change of the step, and after the last; returns how many it tried."""
    number = tried = 0
    while number < MOST:
        world = build()
        try:
            died = dies(partial(step, world), outliving(world), number)
            world.torn = True
            successors(world)
        except AssertionError as reason:
            raise AssertionError(f"{reason}\ndeath came before change {number}") from reason
        if not died:
            break
        tried += 1
        number += 1 if EACH else 1 + random.randrange(1 + number // 8)
    return tried


def successors(world: World) -> None:
    """One takes over and finishes what was begun, then another one, before the quarantine ends."""
    die(world, [])
    swept(world)
    complete_all(world)
    finish_drops(world)
    assert statuses(world) == [ACTIVE] * len(world.held)
    die(world, [])
    swept(world)
    assert statuses(world) == [ACTIVE] * len(world.held)
    end(world)


def finish_drops(world: World) -> None:
    while world.again:
        number = next(n for n, held in enumerate(world.again) if not world.goes_later(held))
        world.close_gate(world.again[number].disk.number)
        assert world.drop_again(number)
        world.hand_over()


def three(world: World) -> None:
    """Images with units of their own, in leaves of their own and in common ones, and a write to each image."""
    for number in range(3):
        take(world, 0, trouble=None)
        preserved(world, range(number, number + 3))
        preserved(world, range(62 + 60 * number, 66 + 60 * number, 2))
        world.write_image(number, Op.WRITE, 8 * number, 16)
        complete_all(world)


def killed_in_drop(dropping: Build) -> None:
    """Hand-over, prune and release: in portion after portion."""
    portions, changes = 0, 0

    def at_portion() -> World:
        world = dropping()
        for _ in range(portions):
            world.portion(0)
        return world

    while True:
        world = at_portion()
        settling = bool(world.settling)
        finish_drops(world)
        end(world)
        if not settling:
            break
        changes += killed_everywhere(at_portion, lambda world: world.portion(0))
        portions += 1
    assert changes > 3


@pytest.mark.parametrize("image", [0, 1, 2])
def test_a_drop(image: int) -> None:
    def dropping() -> World:
        world = World(Shape(units=200))
        three(world)
        world.close_gate(0)
        assert world.drop(image)
        return world

    killed_in_drop(dropping)


@pytest.mark.parametrize("units", [range(2), range(64, 66), range(130, 132)])
@pytest.mark.parametrize("own", [range(0), range(3, 5)])
def test_a_drop_beside_one_that_death_broke_off(own: range, units: range) -> None:
    killed_in_drop(lambda: broken_off(own, units))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("units", [1, 3])
def test_a_copy(early: bool, units: int) -> None:
    def copied() -> World:
        world = World(Shape(early=early))
        take(world, 0, trouble=None)
        preserved(world, range(1, 2))
        take(world, 0, trouble=None)
        world.change(0, Op.WRITE, 8, 8 * units)
        if not early:
            world.complete(find(world, Kind.COPY_READ))
            world.apply(find(world, Kind.COPY_WRITE))
        return world

    kind = Kind.COPY_READ if early else Kind.COPY_WRITE
    assert killed_everywhere(copied, lambda world: world.complete(find(world, kind))) > 3 * units


@pytest.mark.parametrize("behind", [None, Op.WRITE, Op.WRITE_ZEROES])
def test_a_write_to_an_image(behind: Op | None) -> None:
    """One of its units was written before, one preserved; another write waits for its end."""

    def written() -> World:
        world = World(Shape())
        take(world, 0, trouble=None)
        world.write_image(0, Op.WRITE, 8, 8)
        complete_all(world)
        preserved(world, range(2, 3))
        world.write_image(0, Op.WRITE, 0, 32)
        if behind:
            world.write_image(0, behind, 12, 16)
        world.apply(find(world, Kind.IMAGE_WRITE))
        return world

    assert killed_everywhere(written, lambda world: world.complete(find(world, Kind.IMAGE_WRITE))) > 8


@pytest.mark.parametrize("early", [False, True])
def test_a_sweep(early: bool) -> None:
    """After a death in the midst of a drop and of a copy: portion after portion, and the end of the quarantine."""
    portions, changes = 0, 0

    def sweeping() -> World:
        world = World(Shape(units=200, early=early))
        three(world)
        world.change(0, Op.WRITE, 8 * 100, 24)
        if not early:
            world.complete(find(world, Kind.COPY_READ))
        die(world, [], Cut(write=0, published=1, recorded=2))
        complete_all(world)
        for _ in range(portions):
            advance(world)
        return world

    while sweeping_is_on(sweeping()):
        changes += killed_everywhere(sweeping, advance)
        portions += 1
    assert changes > 8


def advance(world: World) -> None:
    if not world.swept:
        world.sweep_portion()
    else:
        world.end_quarantine()


def sweeping_is_on(world: World) -> bool:
    on = not world.swept or world.stores[0].quarantined
    end(world)
    return on
