# SPDX-License-Identifier: MIT
"""Ratios of runs that were measured in the same turn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.cells import FIRST, READS, READS_BUSY, WRITES
from bench.document import CellRuns, Speed
from bench.spread import Spread, spread_of_ratios

DM = "dm-"
BEST_DM = "best dm"
"""The chunk size against which a contender looks worst in this cell."""
PAIRS = {
    WRITES: (
        ("loop", "kublk"),
        ("idle", "kublk"),
        ("idle", "kublk-mapped"),
        ("idle", "loop"),
        ("later", "idle"),
        ("later", BEST_DM),
        ("later", "qemu"),
    ),
    FIRST: (
        ("first", "idle"),
        ("first", BEST_DM),
        ("first", "dm-4k"),
        ("first", "dm-64k"),
        ("first", "dm-256k"),
        ("first", "qemu"),
    ),
    READS: (
        ("loop", "kublk"),
        ("idle", "kublk"),
        ("idle", "kublk-mapped"),
        ("idle", "loop"),
        ("image", "idle"),
        ("image-stored", "idle"),
    ),
    READS_BUSY: (("image", "idle"), ("image-stored", "idle")),
}
"""By group: which contender is compared with which."""
BASES = ("kublk", "loop", "idle")
"""Completion times are shown in units of those of the first of these that a cell has."""


def ratio(one: Sequence[Speed], other: Sequence[Speed]) -> Spread:
    """Of requests per second; each turn is one pair."""
    return spread_of_ratios([each.iops for each in one], [each.iops for each in other])


def ratio_in(cell: CellRuns, one: str, other: str) -> Spread | None:
    """None where one of the two was not measured."""
    others = [name for name in cell.runs if name == other or (other == BEST_DM and name.startswith(DM))]
    if one not in cell.runs:
        return None
    found = [ratio(cell.runs[one], cell.runs[name]) for name in others]
    return min(found, key=lambda each: each.median, default=None)


def ratios(cell: CellRuns) -> dict[str, Spread]:
    """All pairs of its group that were measured, by `one/other`."""
    found = {f"{one}/{other}": ratio_in(cell, one, other) for one, other in PAIRS[cell.group]}
    return {pair: value for pair, value in found.items() if value is not None}


def base_of(cell: CellRuns) -> str | None:
    """The one of BASES that completion times are compared with."""
    return next((name for name in BASES if name in cell.runs), None)


def median_iops(speeds: Sequence[Speed]) -> float:
    """Requests per second."""
    return statistics.median(speed.iops for speed in speeds)


def times(cell: CellRuns, name: str) -> tuple[float, float]:
    """p50 and p99 in microseconds, medians over all turns."""
    speeds = cell.runs[name]
    return statistics.median(s.p50_us for s in speeds), statistics.median(s.p99_us for s in speeds)
