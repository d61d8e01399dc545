# SPDX-License-Identifier: MIT
"""Which portions of map memory another io process gets: those that maps need, and nothing in the place of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import map_memory
from blksnap_ublk.snapshot.catalogue import Catalogue
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.recovery import portions
from blksnap_ublk.snapshot.state_files import IMAGE_HEADER, PAGE, PORTION_BYTES, StateFiles

PAGES = PORTION_BYTES // PAGE
LEAVES = 16  # of a page


class Machine:
    """State files, and an io process that takes what it is given."""

    def __init__(self, directory: Path) -> None:
        none = cast(Any, None)
        (directory / "state").mkdir()
        self.given: list[str] = []
        self.context = Context(
            io=cast(Any, self),
            keeper=none,
            disks=none,
            state=StateFiles(directory / "state"),
            catalogue=Catalogue(directory / "catalogue"),
            registry=none,
            emit=lambda *_, **__: None,
        )

    def call(self, message: messages.AddMapMemory, descriptors: list[int]) -> None:
        assert message.adopt
        assert os.fstat(descriptors[0]).st_size == PORTION_BYTES
        self.given += message.portions

    def inventory(self) -> messages.Inventory:
        return messages.Inventory(4, 1, [], [], [], 0, 0, list(self.given))

    def portion(self, number: int, size: int = PORTION_BYTES) -> Path:
        path = self.context.state.path(map_memory.name_of(number))
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def image(self, name: str, *tables: int) -> Path:
        """A state file whose directory names these tables, as page numbers."""
        path = self.context.state.path(name)
        entries = np.array([0, *(page + 1 for page in tables)], np.uint32)
        path.write_bytes(bytes(IMAGE_HEADER) + entries.tobytes())
        return path

    def leaf(self, table: int, page: int) -> None:
        """Lets the table in page `table` name the last leaf of a page."""
        with self.context.state.path(map_memory.name_of(table // PAGES)).open("r+b") as file:
            file.seek(table % PAGES * PAGE + 8)
            file.write(np.array([0xFFFFFFFF, page * LEAVES + LEAVES], np.uint32).tobytes())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_no_map_needs_makes_room(machine: Machine) -> None:
    for number in range(4):
        machine.portion(number)
    machine.leaf(5, PAGES + 3)
    assert portions.adopt(machine.context, [], {"a": machine.image("a", 5)}) == set()
    assert machine.given == ["map-0", "map-1"]
    assert map_memory.numbers(machine.context) == [0, 1]


def test_a_page_that_is_the_last_of_a_portion(machine: Machine) -> None:
    for number in range(3):
        machine.portion(number)
    machine.leaf(0, PAGES - 1)
    assert portions.adopt(machine.context, [], {"a": machine.image("a", 0, PAGES - 1)}) == set()
    assert machine.given == ["map-0"]


def test_images_without_maps_need_none(machine: Machine) -> None:
    machine.portion(0)
    assert portions.adopt(machine.context, [], {"a": machine.image("a")}) == set()
    assert machine.given == []
    assert map_memory.numbers(machine.context) == []


@pytest.mark.parametrize("short", [True, False])
def test_one_that_is_missing_costs_those_that_need_it(machine: Machine, short: bool) -> None:
    for number in range(3):
        machine.portion(number)
    machine.leaf(1, 2 * PAGES)
    states = {"a": machine.image("a", 0), "b": machine.image("b", 1), "c": machine.image("c", PAGES)}
    missing = machine.portion(1, PORTION_BYTES - PAGE)
    if not short:
        missing.unlink()
    assert portions.adopt(machine.context, [], states) == {"b", "c"}
    assert machine.given == ["map-0"]
    assert map_memory.numbers(machine.context) == [0], "a fresh one must not stand where theirs was"


def test_nonsense_costs_one_image(machine: Machine) -> None:
    machine.portion(0)
    states = {"a": machine.image("a", 3), "b": machine.image("b", 0xFFFFFFF0)}
    assert portions.adopt(machine.context, [], states) == {"b"}
    assert machine.given == ["map-0"]


def test_what_was_given_is_not_given_again(machine: Machine) -> None:
    for number in range(2):
        machine.portion(number)
    machine.given = ["map-0"]
    assert portions.adopt(machine.context, ["map-0"], {"a": machine.image("a", PAGES)}) == set()
    assert machine.given == ["map-0", "map-1"]
