# SPDX-License-Identifier: MIT
"""Between a death and the next process one bit of shared state changes: images are right, or broken, or lost; no crash."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from blksnap_ublk.engine.request import Op
from tests.unit.sim.death import die
from tests.unit.sim.ending import complete_all, read_images, recover
from tests.unit.sim.look import find
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
    """Each byte that means something: heads and directories of images, tables and leaves, records, heads of storages."""
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
        assert error.errno == errno.EBADMSG
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
