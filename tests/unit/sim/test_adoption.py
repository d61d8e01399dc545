# SPDX-License-Identifier: MIT
"""Images, storages and map memory go from a dead process to its successor: single rules, each with a short story."""

from __future__ import annotations

import pytest

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

ALL = 100
UNPUBLISHED = Cut(write=0, published=0, recorded=ALL)


def stored(world: World, start: int, sectors: int) -> None:
    """A write whose old data is in the storage, and whose copy has not ended."""
    world.change(0, Op.WRITE, start, sectors)
    world.complete(find(world, Kind.COPY_READ))
    assert waiting(world) == [Kind.COPY_WRITE]


def test_a_record_without_slot_is_published() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    stored(world, 0, 24)
    die(world, [], UNPUBLISHED)
    assert world.held[0].slots() == 0
    swept(world)
    assert world.held[0].slots() == 3
    complete_all(world)
    end(world)


def test_a_copy_that_is_under_way_does_not_replace_what_was_published_meanwhile() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    stored(world, 0, 8)
    die(world, [], UNPUBLISHED)
    assert waiting(world) == [Kind.COPY_READ]
    swept(world)
    world.change(1, Op.WRITE, 0, 8)
    assert waiting(world) == [Kind.COPY_READ, Kind.CHANGE], "its unit is preserved"
    world.complete(find(world, Kind.CHANGE))
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    end(world)


def test_nothing_is_published_for_a_unit_that_cannot_be_read() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    stored(world, 0, 8)
    die(world, [], UNPUBLISHED)
    world.complete(find(world, Kind.COPY_READ), error=5)
    swept(world)
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    end(world)


def test_writes_while_a_late_copy_lands() -> None:
    """Places of a dead process are not given out before its quarantine ends, whatever it still writes there."""
    world = World(Shape(storages=((6,),)))
    take(world, 0, trouble=None)
    preserved(world, range(2))
    stored(world, 16, 16)
    die(world, [])
    assert [late.offset for late in world.late] == [512 + 2 * 4096]
    complete_all(world)
    assert world.stores[0].unused == 0
    world.change(0, Op.WRITE, 40, 8)
    assert not waiting(world), "it waits for the end of the quarantine"
    swept(world)
    world.land(0)
    assert not waiting(world)
    world.end_quarantine()
    assert waiting(world) == [Kind.COPY_READ]
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    assert world.stores[0].used == 5
    end(world)


def test_a_full_storage_overflows_when_the_quarantine_lasts() -> None:
    world = World(Shape(storages=((2,),)))
    take(world, 0, trouble=None)
    preserved(world, range(1))
    stored(world, 8, 8)
    die(world, [])
    assert not waiting(world)
    world.tick(4_000_000_000)
    assert not waiting(world)
    world.tick(2_000_000_000)
    assert waiting(world) == [Kind.CHANGE]
    assert statuses(world) == [(ImageStatus.OVERFLOWN, 28)]
    complete_all(world)
    end(world)


def test_an_image_that_was_going_goes() -> None:
    """Its map is common to it and to the older one in part; another death comes before the end."""
    for portions in range(4):
        world = World(Shape(units=130))
        for number in range(3):
            take(world, 0, trouble=None)
            preserved(world, range(number, number + 3))
            preserved(world, range(70 + number, 72 + number))
        world.close_gate(0)
        assert world.drop(1)
        for _ in range(portions):
            world.portion(0)
        die(world, [])
        preserved(world, range(60, 66))
        swept(world)
        die(world, [])
        end(world)


@pytest.mark.parametrize("cleared", [0, 1, 3])
@pytest.mark.parametrize("again", [False, True])
def test_the_places_of_an_image_whose_map_was_being_taken_apart(cleared: int, again: bool) -> None:
    """Records that name an image which has long gone are nobody's then; the other images of the storage live.

    Also when it has gone and death comes `again`, before the quarantine ends.
    """
    world = World(Shape(storages=((30,),)))
    for number in range(3):
        take(world, 0, trouble=None)
        preserved(world, range(number, number + 3))
    world.close_gate(0)
    assert world.drop(1)
    world.hand_over()
    assert not world.gone
    assert world.drop(0)
    [going] = world.gone

    def in_the_midst(world: World) -> None:
        directory = going.state[4096:].view("<u4")
        slots = [slot for unit in range(4) if (slot := names[unit])]
        going.state[56:60].view("<u4")[0] = 1
        directory[0] = 0
        for slot in slots[:cleared]:
            world.stores[0].record(slot - 1)[:] = 0
        world.flipped = False

    names = [world.sim.slot(going.image, unit) for unit in range(9)]
    assert sum(map(bool, names)) == 4
    die(world, [], None, in_the_midst)
    swept(world)
    assert statuses(world) == [ACTIVE]
    if again:
        world.close_gate(0)
        assert world.drop_again(0)
        world.hand_over()
        assert not world.gone, "nobody knows any more whose the places were"
        die(world, [])
        swept(world)
        assert statuses(world) == [ACTIVE]
    end(world)


def test_a_refused_image_leaves_no_map_memory_behind() -> None:
    world = World(Shape(units=130))
    for _ in range(2):
        take(world, 0, trouble=None)
        preserved(world, range(0, 130, 40))

    def flip(world: World) -> None:
        younger = world.held[1]
        table = int(younger.state[4096:].view("<u4")[0]) - 1
        world.portions[0].view("<u4")[1024 * table + 2] = 0x7FFFFFFF

    die(world, [], None, flip)
    assert world.lost == [2]
    assert statuses(world) == [(ImageStatus.CORRUPTED, 74)]
    complete_all(world)
    end(world)


def test_a_high_water_mark_beyond_all_areas() -> None:
    """Areas that are added during the sweep are nobody's, whatever the state says."""
    world = World(Shape(storages=((20,),)))
    take(world, 0, trouble=None)
    preserved(world, range(3))

    def flip(world: World) -> None:
        world.stores[0].state.view("<u8")[2] |= 1 << 8

    die(world, [], None, flip)
    assert world.stores[0].unused == 0
    world.sweep_portion()
    world.grow(0, 40)
    world.stores[0].check()
    swept(world)
    world.end_quarantine()
    assert statuses(world) == [ACTIVE]
    end(world)


def test_serials_up_to_the_last() -> None:
    world = World(Shape())
    world.serial = (1 << 24) - 3
    for _ in range(2):
        take(world, 0, trouble=None)
        preserved(world, range(3))
    die(world, [])
    swept(world)
    assert statuses(world) == [ACTIVE] * 2
    end(world)


def test_a_sweep_of_many_portions() -> None:
    """More places than a portion has; areas come while it is under way, and a death, and images."""
    world = World(Shape(unit=512, units=17_000, odd_sectors=0, tracking_block=65536, storages=((10, 17_500),)))
    take(world, 0, trouble=None)
    for start in range(0, 17_000, 1700):
        world.change(0, Op.WRITE, start, 1690)
        complete_all(world)
    for _ in range(2):
        die(world, [])
        world.sweep_portion()
        world.grow(0, 7)
        take(world, 0, trouble=None)
        world.change(0, Op.WRITE, 3, 1)
        complete_all(world)
        swept(world)
        assert statuses(world) == [ACTIVE] * len(world.held)
    end(world)


def test_of_two_writes_to_a_unit_of_an_image_the_later_one_counts() -> None:
    """Death came before the record of what it replaced was cleared."""
    world = World(Shape())
    take(world, 0, trouble=None)
    world.write_image(0, Op.WRITE, 0, 8)
    complete_all(world)
    world.write_image(0, Op.WRITE, 0, 8)
    assert waiting(world) == [Kind.IMAGE_WRITE]
    die(world, [], Cut(write=0, published=1, recorded=1, kept=True))
    written = world.sim.written_slot(world.held[0].image, 0)
    swept(world)
    assert world.sim.written_slot(world.held[0].image, 0) == written == 2
    end(world)


def test_a_leaf_that_was_handed_over_is_not_freed() -> None:
    """With the image that it comes from, which was settled in the next process."""
    world = World(Shape(units=130))
    for leaf in range(2):
        take(world, 0, trouble=None)
        preserved(world, range(64 * leaf, 64 * leaf + 2))
    world.close_gate(0)
    assert world.drop(1)
    world.portion(0)
    die(world, [])
    swept(world)
    world.close_gate(0)
    assert world.drop_again(0)
    world.hand_over()
    world.open_gate(0)
    take(world, 0, trouble=None)
    preserved(world, range(130))
    assert statuses(world) == [ACTIVE] * 2
    end(world)
