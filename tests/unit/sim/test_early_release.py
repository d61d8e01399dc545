# SPDX-License-Identifier: MIT
"""Where buffers outlive the process, a write waits for the old data to be in one, and not for the storage."""

from __future__ import annotations

import errno

import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import SLOT_BAD
from tests.unit.sim.death import die
from tests.unit.sim.ending import complete_all, end, recover
from tests.unit.sim.judge import COPY_LIMIT_NS
from tests.unit.sim.look import ACTIVE, find, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World


def released(units: int = 2, **shape: object) -> World:
    """A world in which the first units of the origin have been overwritten, and the storage has none of them."""
    world = World(Shape(early=True, **shape))  # type: ignore[arg-type]
    take(world, 0, trouble=None)
    request = world.change(0, Op.WRITE, 0, 8 * units)
    assert request
    world.complete(find(world, Kind.COPY_READ))
    assert sorted(kind.name for kind in waiting(world)) == ["CHANGE", "COPY_WRITE"]
    world.complete(find(world, Kind.CHANGE))
    assert request.result == 8 * units * 512
    return world


@pytest.mark.parametrize("zero_copy", [True, False])
def test_the_storage_is_not_waited_for(zero_copy: bool) -> None:
    world = released(zero_copy=zero_copy)
    # Whoever overwrites them again does not wait either.
    again = world.change(1, Op.WRITE, 4, 8)
    assert again
    world.complete(find(world, Kind.CHANGE))
    assert again.result == 4096
    assert waiting(world) == [Kind.COPY_WRITE]
    world.complete(0)
    end(world)


def test_who_waits_for_the_same_units_goes_on_too() -> None:
    world = World(Shape(early=True))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 16)
    second = world.change(1, Op.WRITE, 8, 8)
    assert second
    assert waiting(world) == [Kind.COPY_READ]
    world.complete(0)
    assert sorted(kind.name for kind in waiting(world)) == ["CHANGE", "CHANGE", "COPY_WRITE"]
    complete_all(world)
    end(world)


@pytest.mark.parametrize("zero_copy", [True, False])
def test_images_read_from_the_buffer(zero_copy: bool) -> None:
    world = released(zero_copy=zero_copy)
    read = world.read_image(0, 3, 20)
    assert read
    # Units 0 and 1 from the buffer, at once; unit 2 from the origin.
    assert sorted(kind.name for kind in waiting(world)) == ["COPY_WRITE", "IMAGE_FROM_ORIGIN"]
    world.complete(find(world, Kind.IMAGE_FROM_ORIGIN))
    assert read.result == 20 * 512
    world.complete(0)
    world.read_image(0, 0, 16)
    assert waiting(world) == [Kind.IMAGE_FROM_STORAGE], "it is stored now"
    complete_all(world)
    end(world)


def test_writes_to_an_image_find_the_rest_of_a_unit_in_the_buffer() -> None:
    world = released()
    world.write_image(0, Op.WRITE, 1, 2)
    assert waiting(world) == [Kind.COPY_WRITE, Kind.IMAGE_WRITE]
    complete_all(world)
    end(world)


def test_what_cannot_be_stored_breaks_who_reads_it() -> None:
    world = World(Shape(early=True))
    take(world, 0, trouble=None)
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    world.complete(find(world, Kind.COPY_READ))
    world.complete(find(world, Kind.COPY_WRITE), error=errno.EIO)
    assert statuses(world) == [(ImageStatus.CORRUPTED, errno.EIO)] * 2
    assert world.sim.slot(world.held[1].image, 0) == SLOT_BAD
    assert world.stores[0].used == 0, "nobody has the place"
    complete_all(world)
    take(world, 0, trouble=None)
    assert statuses(world)[-1] == ACTIVE
    end(world)


def test_a_silent_storage_breaks_who_reads_it_after_the_limit() -> None:
    world = released()
    world.tick(COPY_LIMIT_NS - 1)
    assert statuses(world) == [ACTIVE]
    world.tick(1)
    assert statuses(world) == [(ImageStatus.CORRUPTED, errno.ETIMEDOUT)]
    assert world.stores[0].used == 2, "its places may still be written"
    complete_all(world)
    assert world.stores[0].used == 0
    end(world)


def test_a_switch_waits_for_the_storage() -> None:
    """So no image begins, or goes, while a copy is under way: as without early release."""
    world = released()
    world.close_gate(0)
    assert not world.disks[0].device.drained
    world.complete(find(world, Kind.COPY_WRITE))
    assert world.disks[0].device.drained
    assert world.take([0], 0)
    world.open_gate(0)
    end(world)


def test_a_unit_that_cannot_be_read_is_not_released_early() -> None:
    world = World(Shape(early=True))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    world.complete(0, error=errno.EIO)
    assert waiting(world) == [Kind.COPY_WRITE]
    complete_all(world)
    assert world.held[0].unreadable == {0}
    end(world)


@pytest.mark.parametrize("lands", [True, False])
@pytest.mark.parametrize("times", [1, 3])
def test_after_a_death_it_is_stored_from_the_buffer(times: int, lands: bool) -> None:
    world = released()
    for _ in range(times):
        die(world, [])
    if lands:
        world.land(0)
    recover(world)
    assert statuses(world) == [ACTIVE]
    assert world.held[0].has(0)
    end(world)


def test_places_of_one_that_died_are_not_given_out_while_it_may_write_them() -> None:
    """Published is not stored: an image that goes gives its places back, and a late write would hit somebody else."""
    world = released()
    die(world, [])
    while not world.swept:
        world.sweep_portion()
    world.close_gate(0)
    assert world.drop(0)
    world.hand_over()
    world.open_gate(0)
    assert not world.gone
    assert world.stores[0].used == 2
    world.land(0)
    world.end_quarantine()
    assert world.stores[0].used == 0
    end(world)
