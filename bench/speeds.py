# SPDX-License-Identifier: MIT
"""Measures groups of cells: in each turn every contender once, A B C, then C B A, and so on."""

from __future__ import annotations

from collections.abc import Sequence

from bench.cells import Cell, Disk
from bench.contenders.contender import Contender, Unavailable
from bench.contenders.groups import contenders
from bench.document import CellRuns, LeftOut, Speed
from bench.measure import Job, measure_in_turn
from bench.progress import say
from blksnap_ublk.client import Client

OURS = ("loop", "idle", "first", "later", "image", "image-stored", "raw")
"""What fails with these is an error; others are left out of the cell."""


def measure_group(
    group: str, disk: Disk, cells: Sequence[Cell], turns: int, job: Job, way: str, client: Client
) -> tuple[list[CellRuns], list[LeftOut]]:
    """The cells, all of one group, with all contenders of it."""
    found = []
    with contenders(group, disk, job, way, client) as (able, left_out):
        for cell in cells:
            say(f"{group}, {disk.name}, {way}: {cell.job}")
            runs, failures = take_turns(able, cell.job, turns, job)
            found.append(CellRuns(group, disk.name, way, cell.job, runs))
            left_out += [LeftOut(f"{name}: {cell.job}, {disk.name}", reason) for name, reason in failures.items()]
        return found, [LeftOut(f"{each.what} ({group}, {disk.name})", each.reason) for each in left_out]


def take_turns(
    able: Sequence[Contender], cell: str, turns: int, job: Job
) -> tuple[dict[str, list[Speed]], dict[str, str]]:
    """The speeds of each contender, turn by turn, and why some of the others' have none.

    Those between whose runs nothing is to be done are measured by one process.
    """
    if all(contender.steady for contender in able):
        return _take_turns_at_once(able, cell, turns, job)
    runs: dict[str, list[Speed]] = {contender.name: [] for contender in able}
    failures: dict[str, str] = {}
    order = list(able)
    for _ in range(turns):
        for contender in order:
            if contender.name in failures:
                continue
            try:
                runs[contender.name].append(contender.run(cell, job))
            except (Unavailable, RuntimeError) as error:
                if contender.name in OURS:
                    raise
                failures[contender.name] = str(error)
        order.reverse()
    return {name: speeds for name, speeds in runs.items() if name not in failures}, failures


def _take_turns_at_once(
    able: Sequence[Contender], cell: str, turns: int, job: Job
) -> tuple[dict[str, list[Speed]], dict[str, str]]:
    """The same for contenders that are all steady."""
    order = [contender for turn in range(turns) for contender in (able if turn % 2 == 0 else able[::-1])]
    speeds = measure_in_turn(cell, [contender.device for contender in order], job)
    runs: dict[str, list[Speed]] = {contender.name: [] for contender in able}
    failures: dict[str, str] = {}
    for contender, speed in zip(order, speeds, strict=True):
        if speed is not None:
            runs[contender.name].append(speed)
        elif contender.name in OURS:
            raise RuntimeError(f"fio {cell} on {contender.name}, {contender.device}, failed")
        else:
            failures[contender.name] = "fio failed with an I/O error"
    return {name: found for name, found in runs.items() if name not in failures}, failures
