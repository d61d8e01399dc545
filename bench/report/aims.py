# SPDX-License-Identifier: MIT
"""What the filter is to reach, beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from bench.cells import FIRST, RAM, READS, SLOW, WRITES
from bench.document import CellRuns, Document
from bench.report.ratios import BEST_DM, ratio, ratio_in
from bench.spread import Spread


class Outcome(Enum):
    """`UNCLEAR`: the aim lies within the spread of what was measured, which is wide."""

    MET = "met"
    MISSED = "**missed**"
    UNCLEAR = "unclear"
    REPORTED = "–"


@dataclass(frozen=True)
class Verdict:
    """One aim in one cell."""

    aim: str
    where: str
    wanted: str
    measured: str
    outcome: Outcome


@dataclass(frozen=True)
class RatioAim:
    """`one` in units of `other` is to be `least` or more, in the cells of a group on these disks."""

    text: str
    group: str
    one: str
    other: str
    least: float
    disks: tuple[str, ...]
    jobs: Callable[[str], bool]


def _any(_job: str) -> bool:
    return True


def _first_4k(job: str) -> bool:
    """Jobs in which every write is the first in chunks of any size."""
    return job.startswith("spread-")


EVERYWHERE = (RAM.name, SLOW.name)
RATIO_AIMS = (
    RatioAim("idle filter / bare kublk loop, writes", WRITES, "idle", "kublk", 0.97, EVERYWHERE, _any),
    RatioAim("idle filter / bare kublk loop, reads", READS, "idle", "kublk", 0.97, EVERYWHERE, _any),
    RatioAim("later overwrites / idle", WRITES, "later", "idle", 0.97, EVERYWHERE, _any),
    RatioAim("first overwrites / dm-snapshot at its best", FIRST, "first", BEST_DM, 1.0, (SLOW.name,), _first_4k),
    RatioAim("first overwrites / dm-snapshot at 256 KiB", FIRST, "first", "dm-256k", 3.0, (SLOW.name,), _first_4k),
    RatioAim("first overwrites / dm-snapshot at its best", FIRST, "first", BEST_DM, 0.6, (RAM.name,), _first_4k),
    RatioAim("image reads / filtered reads", READS, "image", "idle", 0.95, EVERYWHERE, _any),
)
GATE_BEYOND_US = 1000
WIDE = 0.1
"""Distance of the quartiles, in units of the median."""
MANY = "50"
ONE, ANOTHER_ONE = "1", "another 1"
MANY_LEAST = 0.97
STORAGE_MOST = 1.01


def verdicts(document: Document) -> list[Verdict]:
    """All aims that this result says something about, in order."""
    return [
        *_of_ratios(document.speeds),
        *_of_held(document.held),
        *_of_cost(document),
        *_of_gates(document),
        *_of_pauses(document),
    ]


def _of_ratios(speeds: Sequence[CellRuns]) -> Iterator[Verdict]:
    for aim in RATIO_AIMS:
        for disk in aim.disks:
            cells = [cell for cell in speeds if cell.group == aim.group and cell.disk == disk and aim.jobs(cell.cell)]
            for cell in cells:
                found = ratio_in(cell, aim.one, aim.other)
                if found is not None:
                    where = f"{disk}, {cell.cell}, {cell.way}"
                    yield Verdict(aim.text, where, f"≥ {aim.least:.2f}", str(found), _outcome(found, aim.least))


def _of_held(held: Sequence[CellRuns]) -> Iterator[Verdict]:
    for cell in held:
        found = ratio(cell.runs[MANY], cell.runs[ONE])
        noise: Spread = ratio(cell.runs[ANOTHER_ONE], cell.runs[ONE])
        yield Verdict(
            f"{MANY} snapshots / one",
            f"{cell.disk}, {cell.group} {cell.cell}",
            f"≥ {MANY_LEAST}",
            f"{found}; another one / one: {noise}",
            _outcome(found, MANY_LEAST),
        )


def _of_cost(document: Document) -> Iterator[Verdict]:
    cost = document.cost
    if cost is not None:
        share = cost.used / (cost.writes * 4096)
        yield Verdict(
            "bytes of storage / preserved",
            f"{cost.writes} random 4 KiB",
            f"≤ {STORAGE_MOST}",
            f"{share:.4f}",
            Outcome.MET if share <= STORAGE_MOST else Outcome.MISSED,
        )


def _of_gates(document: Document) -> Iterator[Verdict]:
    for gate in document.gates:
        middle = statistics.median(gate.beyond)
        yield Verdict(
            "gate beyond the slowest write in flight",
            f"{gate.setting}, {'nobody writes' if gate.load == 'idle' else 'full load'}",
            "≤ 1 ms",
            f"{middle / 1000:.2f} ms, longest {max(gate.beyond) / 1000:.2f} ms",
            Outcome.MET if middle <= GATE_BEYOND_US else Outcome.MISSED,
        )
    for gate in document.gates:
        if gate.between is not None and gate.during is not None:
            yield Verdict(
                "writer's p99 during takes / between",
                gate.setting,
                "reported",
                f"{gate.during.p99 / gate.between.p99:.2f}",
                Outcome.REPORTED,
            )


def _of_pauses(document: Document) -> Iterator[Verdict]:
    for pause in document.pauses:
        found = f"{statistics.median(pause.seconds):.2f} s, longest {max(pause.seconds):.2f} s"
        yield Verdict("pause when the serving process is killed", pause.setting, "reported", found, Outcome.REPORTED)


def _outcome(found: Spread, least: float) -> Outcome:
    if found.low < least <= found.high and found.high - found.low > WIDE * found.median:
        return Outcome.UNCLEAR
    return Outcome.MET if found.median >= least else Outcome.MISSED
