# SPDX-License-Identifier: MIT
"""Storage of every size from nothing to enough, for each of what may be done about it when it is full.

The origin is right at every step, and images are right or say that they are not: see judge.py. Here is what each
policy promises beyond that.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.look import ACTIVE, statuses
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

UNITS = 20
WAIT_MS = 4000
LATER_MS = 3_600_000
STEPS = 4

Meet = Callable[[World, int], None]
"""What is done about requests that do not go on by themselves; for the how many-th time."""


class Story:
    """Three snapshots of one device, two of them in the storage that is small; `most`: what it needs at most."""

    most = 14 + 12

    def __init__(self, units: int, wait_ms: int, meet: Meet) -> None:
        self.meet = meet
        self.met = 0
        shape = Shape(units=UNITS, odd_sectors=3, depth=8, storages=((units,) if units else (), (UNITS,)))
        self.world = World(shape)
        self.world.set_room(0, wait_ms)

    def play(self) -> None:
        """All of it but the end."""
        world = self.world
        self._take(0)
        world.change(0, Op.WRITE, 0, 30)
        world.change(1, Op.WRITE, 20, 40)
        self._flow()
        self._take(1)
        world.change(0, Op.WRITE, 4, 60)
        world.change(2, Op.WRITE_ZEROES, 70, 20)
        self._flow()
        self._take(0)
        for number in range(4):
            world.change(number, Op.WRITE, 24 * number + 3, 24)
        world.change(1, Op.DISCARD, 0, 1000)
        for image in range(3):
            world.read_image(image, 0, 1000)
        self._flow()
        for image in range(3):
            world.read_image(image, 0, 1000)
        self._flow()

    def _take(self, store: int) -> None:
        world = self.world
        world.close_gate(0)
        assert world.take([0], store)
        world.open_gate(0)

    def _flow(self) -> None:
        world = self.world
        complete_all(world)
        for _ in range(10_000):
            if not world.requests:
                return
            assert world.stores[0].waiting, f"requests that wait for nothing: {list(world.requests.values())}"
            self.met += 1
            self.meet(world, self.met)
            complete_all(world)
        raise AssertionError("it never ends")


def never(world: World, _: int) -> None:
    """No room comes: the limit passes."""
    world.tick(WAIT_MS * 1_000_000)


class Evict:
    """The oldest image of the storage goes; only one that is alone overflows."""

    def __init__(self) -> None:
        self.overflows = 0

    def __call__(self, world: World, _: int) -> None:
        chain = [number for number, held in enumerate(world.held) if held.store is world.stores[0]]
        if world.evict(chain[0]):
            world.hand_over()
            return
        assert not any(world.held[number].active for number in chain[:-1]), "there was one to evict"
        self.overflows += 1
        world.set_room(0, 0)
        world.set_room(0, LATER_MS)


def comes_at(step: int) -> Meet:
    """As much as a unit of room comes each time from that one on, until then it is waited for."""

    def meet(world: World, number: int) -> None:
        if number >= step:
            world.grow(0, 1)
        else:
            world.tick(WAIT_MS * 1_000_000)

    return meet


def unused(_: World, __: int) -> None:
    raise AssertionError("a request waits though nobody is to wait")


def of_small(world: World) -> list[tuple[ImageStatus, int]]:
    """Of the images in the small storage; those in the other one do not notice anything."""
    small = [status for held, status in zip(world.held, statuses(world), strict=True) if held.store is world.stores[0]]
    others = [status for held, status in zip(world.held, statuses(world), strict=True) if held.store is world.stores[1]]
    assert others == [ACTIVE] * len(others)
    assert all(status in (ACTIVE, (ImageStatus.OVERFLOWN, errno.ENOSPC)) for status in small)
    return small


def test_enough_is_enough() -> None:
    story = Story(Story.most, 0, unused)
    story.play()
    assert of_small(story.world) == [ACTIVE] * 2
    assert story.world.stores[0].used <= Story.most
    end(story.world)


@pytest.mark.parametrize("units", range(Story.most))
def test_break(units: int) -> None:
    story = Story(units, 0, unused)
    story.play()
    assert of_small(story.world) == [ACTIVE] * 2 or story.world.stores[0].used == units
    end(story.world)


@pytest.mark.parametrize("units", range(Story.most))
def test_pause_in_vain(units: int) -> None:
    story = Story(units, WAIT_MS, never)
    story.play()
    assert bool(story.met) == any(status != ACTIVE for status in of_small(story.world))
    end(story.world)


@pytest.mark.parametrize("units", range(Story.most))
def test_pause_until_there_is_room(units: int) -> None:
    for step in range(1, STEPS):
        story = Story(units, WAIT_MS, comes_at(step))
        story.play()
        if step == 1:
            assert of_small(story.world) == [ACTIVE] * 2
        end(story.world)


@pytest.mark.parametrize("units", range(Story.most))
def test_evict(units: int) -> None:
    policy = Evict()
    story = Story(units, LATER_MS, policy)
    story.play()
    assert sum(status != ACTIVE for status in of_small(story.world)) <= policy.overflows
    assert units < 14 or not policy.overflows
    end(story.world)
