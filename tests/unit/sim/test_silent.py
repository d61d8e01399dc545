# SPDX-License-Identifier: MIT
"""A storage that does not answer is waited for once."""

from __future__ import annotations

import errno

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.judge import COPY_LIMIT_NS
from tests.unit.sim.look import ACTIVE, find, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

SILENT = (ImageStatus.CORRUPTED, errno.ETIMEDOUT)


def silent_with_an_older_image() -> World:
    """The older of two images has unit 0; the younger was lost when the storage did not take it."""
    world = World(Shape(units=80))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    world.complete(find(world, Kind.COPY_READ))
    assert waiting(world) == [Kind.COPY_WRITE]
    world.tick(COPY_LIMIT_NS)
    assert statuses(world) == [ACTIVE, SILENT]
    return world


def test_the_second_write_does_not_wait() -> None:
    world = silent_with_an_older_image()
    world.change(1, Op.WRITE, 512, 8)
    assert statuses(world) == [SILENT, SILENT]
    assert waiting(world).count(Kind.COPY_READ) == 0
    complete_all(world)
    end(world)


def test_a_storage_that_answers_again_is_used_again() -> None:
    world = silent_with_an_older_image()
    world.complete(find(world, Kind.COPY_WRITE))
    world.change(1, Op.WRITE, 512, 8)
    complete_all(world)
    assert statuses(world) == [ACTIVE, SILENT]
    end(world)
