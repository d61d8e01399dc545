# SPDX-License-Identifier: MIT
"""Requests to images that wait for a storage which does not answer: they end, the image stays."""

from __future__ import annotations

import errno

import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.judge import COPY_LIMIT_NS
from tests.unit.sim.look import waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World


def preserved(zero_copy: bool) -> World:
    """A world with an image of which one unit lies in storage."""
    world = World(Shape(zero_copy=zero_copy))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    return world


def begin(world: World, op: Op) -> None:
    """A request of the image that waits for storage."""
    if op is Op.READ:
        world.read_image(0, 0, 8)
        assert waiting(world) == [Kind.IMAGE_FROM_STORAGE]
    else:
        world.write_image(0, op, 0, 8)
        assert len(world.ios) == 1


@pytest.mark.parametrize("zero_copy", [True, False])
@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_after_the_limit_the_request_ends_and_the_image_stays(op: Op, zero_copy: bool) -> None:
    world = preserved(zero_copy)
    begin(world, op)
    world.tick(COPY_LIMIT_NS - 1)
    assert world.requests
    world.tick(1)
    assert not world.requests, "it is given up"
    assert world.held[0].image.status == (ImageStatus.ACTIVE, 0)
    assert world.ios, "its I/O is under way, with its buffer and its place"
    complete_all(world)
    end(world)


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_when_the_image_is_broken_nobody_waits(op: Op) -> None:
    world = preserved(zero_copy=True)
    begin(world, op)
    image = world.held[0].image
    world.held[0].status = ImageStatus.CORRUPTED
    image.break_(ImageStatus.CORRUPTED, errno.ECANCELED)
    world.tick(1)
    assert not world.requests
    with pytest.raises(OSError, match="queue"):
        world.sim.del_queue(world.held[0].queue or 0)
    world.complete(0, error=errno.EIO)
    end(world)


def test_who_waits_for_a_buffer_is_given_up_at_once() -> None:
    """The other image requests hold all buffers for storage."""
    world = World(Shape(depth=64, units=600))
    take(world, 0, trouble=None)
    for start in range(0, 4096, 512):
        world.change(0, Op.WRITE, start, 512)
        complete_all(world)
    for start in range(0, 4096, 512):
        world.read_image(0, start, 512)
    for _ in range(3):  # what is slow does not keep the rest from beginning
        world.tick(10**9)
    under_way = len(world.ios)
    assert under_way < 8
    world.tick(COPY_LIMIT_NS)
    assert not world.requests
    assert len(world.ios) == under_way
    complete_all(world)
    end(world)
