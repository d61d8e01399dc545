# SPDX-License-Identifier: MIT
"""Map memory that a dead io process left: which portions of it hold maps, and giving them to its successor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import map_memory
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.state_files import IMAGE_HEADER, PAGE, PORTION_BYTES

_PORTION_PAGES = PORTION_BYTES // PAGE
_PAGE_LEAVES = 16
_TABLE_LEAVES = 1024
_LEAF_ZERO = 0xFFFFFFFF  # stands for a leaf that is nowhere

Indices = NDArray[np.uint32]


def adopt(context: Context, given: list[str], states: Mapping[str, Path]) -> set[str]:
    """Gives the io process the portions that the maps in these image state files need, in their order; the keys of
    those images that need one which is not there.

    `given`: those that it has. The others are removed: they hold nothing, and fresh ones come in their places. For a
    caller that has `map_memory.halted`. Raises IoRefused, Failed, OSError.
    """
    numbers = map_memory.numbers(context)
    there = 0
    while there in numbers and _is_whole(context, there):
        there += 1
    needed = {key: -(-_pages(context, there, path) // _PORTION_PAGES) for key, path in states.items()}
    fitting = [count for count in needed.values() if count <= there]
    for number in range(len(given), max(fitting, default=0)):
        name = map_memory.name_of(number)
        descriptor = context.state.open(name)
        try:
            context.io.call(messages.AddMapMemory([name], adopt=True), [descriptor])
        finally:
            os.close(descriptor)
    map_memory.remove_unused(context)
    return {key for key, count in needed.items() if count > there}


def _is_whole(context: Context, number: int) -> bool:
    return context.state.path(map_memory.name_of(number)).stat().st_size == PORTION_BYTES


def _pages(context: Context, portions: int, state: Path) -> int:
    """One more than the last page of map memory that the maps of an image use."""
    with state.open("rb") as file:
        file.seek(IMAGE_HEADER)
        entries = file.read()
    tables = np.frombuffer(entries[: len(entries) // 4 * 4], np.uint32)
    tables = tables[tables != 0] - 1
    most = int(tables.max()) + 1 if len(tables) else 0
    for portion in range(portions):
        here = tables[tables // _PORTION_PAGES == portion] % _PORTION_PAGES
        if len(here):
            path = context.state.path(map_memory.name_of(portion))
            pages = np.memmap(path, np.uint32, "r", shape=(_PORTION_PAGES, _TABLE_LEAVES))
            for table in here:
                most = max(most, _last_leaf_page(pages[table]) + 1)
    return most


def _last_leaf_page(leaves: Indices) -> int:
    known = leaves[(leaves != 0) & (leaves != _LEAF_ZERO)]
    return int(known.max() - 1) // _PAGE_LEAVES if len(known) else -1
