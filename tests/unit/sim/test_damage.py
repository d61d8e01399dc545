# SPDX-License-Identifier: MIT
"""Whatever bit changes in a storage, or in its records: EIO and an image that is corrupted, never other data."""

from __future__ import annotations

import errno

import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.look import statuses
from tests.unit.sim.scenarios import take
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

UNIT = 512
RECORD = 16
SPOILT = (ImageStatus.CORRUPTED, errno.EBADMSG)


def stored(zero_copy: bool) -> World:
    """Three units in storage: one that was preserved, one that was written to the image, one of both."""
    world = World(Shape(unit=UNIT, units=8, odd_sectors=0, zero_copy=zero_copy))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 2)
    complete_all(world)
    world.write_image(0, Op.WRITE, 1, 2)
    complete_all(world)
    return world


def spoil(world: World, byte: int | None, record_byte: int | None, place: int) -> None:
    """A read of what lies in that place fails, the image is broken, and so it stays."""
    world.damage(0, place, record_byte, byte=byte or 0)
    request = world.read_image(0, 0, 3)
    complete_all(world)
    assert request
    assert request.result == -errno.EIO
    assert statuses(world) == [SPOILT]
    again = world.read_image(0, 5, 1)
    complete_all(world)
    assert again
    assert again.result == -errno.EIO


@pytest.mark.parametrize("zero_copy", [True, False])
@pytest.mark.parametrize("place", [0, 2, 3], ids=["preserved", "written", "written over what was preserved"])
def test_every_byte_of_the_data(place: int, zero_copy: bool) -> None:
    for byte in range(place, UNIT, 7):
        world = stored(zero_copy)
        assert world.stores[0].used == 4
        spoil(world, byte, None, place)
        end(world)


@pytest.mark.parametrize("place", [0, 2, 3])
def test_every_byte_of_a_record(place: int) -> None:
    for byte in range(RECORD):
        world = stored(zero_copy=True)
        spoil(world, None, byte, place)
        end(world)


def test_what_nobody_reads_may_change() -> None:
    """The place of a unit that was written to the image since: the image does not need it."""
    world = stored(zero_copy=True)
    world.damage(0, 1)
    request = world.read_image(0, 0, 8)
    complete_all(world)
    assert request
    assert request.result == 8 * UNIT
    end(world)
