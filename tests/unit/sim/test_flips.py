# SPDX-License-Identifier: MIT
"""One bit of shared state changes between a death and the next process: images are right, broken or lost; no crash."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.sim.death import die
from tests.unit.sim.ending import complete_all, read_images, recover
from tests.unit.sim.look import ACTIVE, find, statuses
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

SHAPE = Shape(unit=512, units=70, odd_sectors=0, tracking_block=4096, storages=((6, 60), (40,)), zero_copy=False)
STRIDE = 1 if os.environ.get("BSU_ALL_BITS") == "1" else 7


def story() -> World:
    """Four images in two chains, each with units of its own and written to; one goes, is handed over in part, and units
    cannot be read; copies and writes are under way."""
    world = World(SHAPE)
    for number in range(4):
        world.close_gate(0)
        complete_all(world)
        assert world.take([0], number % 2 if number < 2 else 0, [(69, 1)])
        world.open_gate(0)
        for unit in (0, 1, 2 + number, 64 + number):
            world.change(0, Op.WRITE, unit, 1)
        world.change(0, Op.WRITE, 20 + number, 1)
        if number == 1:
            world.complete(find(world, Kind.COPY_READ), error=errno.EIO)
        complete_all(world)
    for image in range(4):
        world.write_image(image, Op.WRITE, 1, 2)
        world.write_image(image, Op.WRITE_ZEROES, 5, 1)
        complete_all(world)
        world.write_image(image, Op.WRITE, 1, 1)
        complete_all(world)
    world.close_gate(0)
    assert world.drop(2)
    world.portion(0)
    world.open_gate(0)
    world.change(0, Op.WRITE, 30, 4)
    world.complete(find(world, Kind.COPY_READ))
    world.write_image(0, Op.WRITE, 40, 1)
    return world


def _places(world: World) -> Iterator[tuple[Any, int]]:
    """Each byte that means something: heads and directories of images, tables, leaves, records, heads of storages."""
    for held in world.held + world.gone:
        yield from ((held.state, at) for at in (*range(64), *range(4096, 4104)))
    for memory in (*world.portions, *(records for store in world.stores for _, records in store.records)):
        yield from ((memory, int(at)) for at in np.flatnonzero(memory))
    for store in world.stores:
        yield from ((store.state, at) for at in range(64))


def _flip(number: int, bit: int) -> Callable[[World], None]:
    def flip(world: World) -> None:
        memory, at = list(_places(world))[number]
        memory[at] ^= 1 << bit

    return flip


def outlive(number: int, bit: int) -> bool:
    """The next process goes on with what is there; False: a storage is refused, and all that lies in it is lost."""
    world = story()
    try:
        die(world, [], None, _flip(number, bit))
    except OSError as error:
        if error.errno != errno.EBADMSG:
            raise
        return False
    world.change(0, Op.WRITE, 0, 1)
    complete_all(world)
    world.land(0)
    recover(world)
    read_images(world)
    world.change(0, Op.WRITE, 0, 70)
    complete_all(world)
    read_images(world)
    while world.held:
        world.close_gate(0)
        complete_all(world)
        assert world.drop(len(world.held) // 2)
        world.hand_over()
        assert world.take([0], 0) or not world.held
        world.open_gate(0)
        world.change(0, Op.WRITE, 0, 70)
        complete_all(world)
        read_images(world)
        if world.serial > 12:
            break
    return True


def test_a_flipped_bit_is_never_wrong_data() -> None:
    """One bit of each seventh byte, another one with each; all bits of all bytes with BSU_ALL_BITS=1."""
    bytes_ = len(list(_places(story())))
    refused = 0
    for number in range(0, bytes_, STRIDE):
        for bit in range(8) if STRIDE == 1 else (number % 8,):
            refused += not outlive(number, bit)
    assert refused < bytes_ // STRIDE // 4


SPOILT = (ImageStatus.CORRUPTED, errno.EBADMSG)


def two_images() -> World:
    """Units 0 to 3 are preserved for both, in places 0-3 and 4-7; unit 9 is written to both, in places 8 and 9."""
    world = World(Shape(unit=512, units=70, odd_sectors=0))
    for _ in range(2):
        take(world, 0, trouble=None)
        world.change(0, Op.WRITE, 0, 4)
        complete_all(world)
    for image in range(2):
        world.write_image(image, Op.WRITE, 9, 1)
        complete_all(world)
    return world


def _leaf(world: World, image: int, *, written: bool = False) -> Any:
    """The slots of the first leaf of a map."""
    words = world.portions[0].view("<u4")
    table = int(world.held[image].state[4096:].view("<u4")[int(written)]) - 1
    leaf = int(words[1024 * table]) - 1
    return words[64 * leaf : 64 * leaf + 64]


def outcome(image: int, unit: int, slot: int, *, written: bool = False) -> list[tuple[ImageStatus, int]]:
    """Of both images, when the sweep has found another slot there."""
    world = two_images()

    def flip(world: World) -> None:
        _leaf(world, image, written=written)[unit] = slot

    die(world, [], None, flip)
    recover(world)
    found = statuses(world)
    read_images(world)
    return found


def test_a_slot_that_names_the_place_of_another_unit() -> None:
    assert outcome(0, 1, 3) == [SPOILT, ACTIVE]


def test_what_is_wrong_in_a_younger_map_breaks_older_images_too() -> None:
    assert outcome(1, 1, 7) == [SPOILT, SPOILT]


def test_a_slot_that_names_the_place_of_another_image() -> None:
    """Whose it is cannot be told; and when one of them goes, the other one's must not be given to somebody else."""
    assert outcome(0, 1, 6) == [SPOILT, SPOILT]


def test_a_slot_that_names_what_was_written_to_another_image() -> None:
    assert outcome(0, 9, 10, written=True) == [SPOILT, ACTIVE]
    assert outcome(1, 9, 9, written=True) == [ACTIVE, SPOILT]


def test_a_slot_beyond_all_places() -> None:
    assert outcome(1, 2, 5000) == [SPOILT, SPOILT]


def test_a_slot_that_was_lost() -> None:
    assert outcome(0, 2, 0) == [SPOILT, ACTIVE]
    assert outcome(1, 9, 0, written=True) == [ACTIVE, SPOILT]


def test_zeroes_that_were_lost() -> None:
    """They have no record, but their number is known."""
    world = two_images()
    world.write_image(1, Op.WRITE_ZEROES, 20, 3)
    complete_all(world)

    def flip(world: World) -> None:
        _leaf(world, 1, written=True)[21] = 0

    die(world, [], None, flip)
    recover(world)
    assert statuses(world) == [ACTIVE, SPOILT]


@pytest.mark.parametrize("lost", ["slot", "leaf"])
def test_exempt_units_that_were_lost(lost: str) -> None:
    """So are these: an image would show the difference storage that lies there."""
    world = World(Shape(unit=512, units=140, odd_sectors=0))
    for _ in range(2):
        world.close_gate(0)
        assert world.take([0], 0, [(64, 66)])
        world.open_gate(0)
        world.change(0, Op.WRITE, 0, 4)
        complete_all(world)

    def flip(world: World) -> None:
        words = world.portions[0].view("<u4")
        table = int(world.held[1].state[4096:].view("<u4")[0]) - 1
        leaf = int(words[1024 * table + 2]) - 1
        if lost == "leaf":
            words[1024 * table + 1] = 0
        else:
            words[64 * leaf] = 0

    die(world, [], None, flip)
    recover(world)
    assert statuses(world) == [SPOILT, SPOILT]


@pytest.mark.parametrize(("status", "error"), [(3, 0), (1, errno.EIO), (7, 0), (0, 0)])
def test_a_status_that_cannot_be(status: int, error: int) -> None:
    world = two_images()

    def flip(world: World) -> None:
        world.held[1].state.view("<u4")[6:8] = status, error

    die(world, [], None, flip)
    assert statuses(world) == [ACTIVE, SPOILT]
    recover(world)
    read_images(world)


def test_death_before_an_overflow_is_whole() -> None:
    """Its reason is there already."""
    world = two_images()

    def flip(world: World) -> None:
        world.held[1].state.view("<u4")[7] = errno.ENOSPC

    die(world, [], None, flip)
    assert statuses(world) == [ACTIVE, (ImageStatus.OVERFLOWN, errno.ENOSPC)]
    recover(world)
    read_images(world)
