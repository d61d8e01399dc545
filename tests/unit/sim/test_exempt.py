# SPDX-License-Identifier: MIT
"""Ranges of an image that are zeroes for ever and not preserved: difference storage on the device itself."""

from __future__ import annotations

import errno

import pytest

from blksnap_ublk.engine.request import Op
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.look import ACTIVE, statuses, waiting
from tests.unit.sim.scenarios import drop, take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World


def test_exempt_units_are_zeroes_for_ever_and_never_preserved() -> None:
    """Two whole leaves, and parts of those before and after them."""
    world = World(Shape(units=300, odd_sectors=0))
    world.close_gate(0)
    assert world.take([0], 0, exempt=[(60, 140)])
    world.open_gate(0)
    world.change(0, Op.WRITE, 8 * 50, 8 * 160)
    complete_all(world)
    assert world.held[0].image.preserved == 20 * 4096
    assert world.held[0].slots() == 20
    world.read_image(0, 0, 2400)
    complete_all(world)
    world.write_image(0, Op.WRITE, 8 * 70 + 3, 8 * 80)
    complete_all(world)
    world.change(0, Op.DISCARD, 8 * 60, 8 * 140)
    assert Kind.CHANGE in waiting(world)
    complete_all(world)
    end(world)


def test_an_exempt_range_of_one_unit_and_of_all() -> None:
    for ranges in ([(5, 1)], [(0, 256)], [(0, 64), (64, 1), (66, 1)]):
        world = World(Shape(units=256, odd_sectors=0))
        world.close_gate(0)
        assert world.take([0], 0, exempt=ranges)
        world.open_gate(0)
        world.change(0, Op.WRITE, 0, 2048)
        complete_all(world)
        assert world.held[0].slots() == 256 - sum(count for _, count in ranges)
        end(world)


def test_ranges_that_cannot_be_exempt() -> None:
    world = World(Shape(units=20, odd_sectors=3))
    take(world, 0, trouble=None)
    image = world.held[0].image
    for start, length in ((0, 4096), (1, 4096), (0, 512), (0, 0), (1 << 40, 4096), (4096, 1 << 40)):
        with pytest.raises(OSError, match="exempt") as caught:
            image.exempt(start, length)
        assert caught.value.errno == errno.EINVAL
    end(world)


def test_map_memory_for_exempt_ranges_ends_anywhere() -> None:
    for pages in range(3):
        world = World(Shape(units=300, odd_sectors=0))
        world.starve(pages)
        world.close_gate(0)
        assert world.take([0], 0, exempt=[(60, 140)])
        assert (world.scarcity is None) == (pages < 2)
        world.feed()
        world.open_gate(0)
        world.change(0, Op.WRITE, 8 * 50, 8 * 160)
        complete_all(world)
        assert world.held[0].slots() == 20
        end(world)


@pytest.mark.parametrize("goes", [0, 1, 2])
def test_exempt_ranges_stay_when_others_go(goes: int) -> None:
    """The first image has what the second one is exempt from; the third is taken when it is storage no more."""
    world = World(Shape(units=300, odd_sectors=0))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 8 * 60, 8 * 140)
    complete_all(world)
    world.close_gate(0)
    assert world.take([0], 0, exempt=[(60, 140)])
    world.open_gate(0)
    world.change(0, Op.WRITE, 8 * 50, 8 * 20)
    complete_all(world)
    assert world.held[1].slots() == 10
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 8 * 50, 8 * 160)
    complete_all(world)
    assert world.held[2].slots() == 160
    world.close_gate(0)
    assert world.drop(goes)
    world.hand_over()
    world.open_gate(0)
    for image in range(2):
        world.read_image(image, 0, 2400)
        complete_all(world)
    world.change(0, Op.WRITE, 0, 2400)
    complete_all(world)
    world.evict(0)
    world.hand_over()
    assert statuses(world) == [ACTIVE]
    end(world)


def test_whole_leaves_that_several_images_are_exempt_from() -> None:
    """A leaf of the older one that is exempt in part stays as it is when the younger one's goes."""
    world = World(Shape(units=300, odd_sectors=0))
    world.close_gate(0)
    assert world.take([0], 0, exempt=[(70, 200)])
    world.open_gate(0)
    world.change(0, Op.WRITE, 8 * 64, 8 * 6)
    complete_all(world)
    world.close_gate(0)
    assert world.take([0], 0, exempt=[(64, 206)])
    assert world.take([0], 0, exempt=[(64, 128)])
    world.open_gate(0)
    assert world.evict(1)
    world.hand_over()
    world.change(0, Op.WRITE, 0, 2400)
    complete_all(world)
    world.close_gate(0)
    assert world.take([0], 0, exempt=[(0, 300)])
    assert world.drop(0)
    world.hand_over()
    world.open_gate(0)
    for image in range(2):
        world.read_image(image, 0, 2400)
        complete_all(world)
    end(world)


def test_trims_of_what_becomes_storage_are_forgotten() -> None:
    """They would take away what is kept there when they are sent at last."""
    world = World(Shape(units=40, odd_sectors=0))
    device = world.disks[0].device
    take(world, 0, trouble=None)
    world.change(0, Op.DISCARD, 0, 80)
    complete_all(world)
    device.forget_swallowed(4 * 4096, 3 * 4096)
    for start, length in ((1 << 40, 4096), (0, 1 << 40), (0, 0)):
        device.forget_swallowed(start, length)
    drop(world, 0, None)
    world.close_gate(0)
    sent = []
    while run := world.sim.next_swallowed(device, 1 << 20):
        sent.append(run)
        world.disks[0].interval.touch(*run)
    assert sent == [(0, 4 * 4096), (7 * 4096, 3 * 4096)]
    world.open_gate(0)
    end(world)
