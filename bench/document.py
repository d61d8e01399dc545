# SPDX-License-Identifier: MIT
"""What a run of the benchmarks has measured: every single figure, in JSON; reports are made from it."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

BUSY = 0.25
"""Programs that run for each CPU, beside the benchmarks: more than that disturbs them."""


class Speed(Struct, frozen=True):
    """What one run of fio found: requests per second, and completion times of requests in microseconds."""

    iops: float
    p50_us: float
    p99_us: float


class CellRuns(Struct):
    """The speeds of each contender in one cell, turn by turn: the n-th of each were measured next to one another.

    `group` is that of the contenders (`bench.cells`), `way` the data way that was asked for.
    """

    group: str
    disk: str
    way: str
    cell: str
    runs: dict[str, list[Speed]]


class LeftOut(Struct, frozen=True):
    """A contender, or a part, that could not be measured here, and why."""

    what: str
    reason: str


class Times(Struct, frozen=True):
    """Completion times of `count` writes, in microseconds."""

    count: int
    p50: float
    p99: float
    longest: float


class Gate(Struct):
    """`gates`: microseconds that each take held new writes, `beyond`: those after the last write in flight had ended.

    The times of writes, `between` takes and `during` them, are None where nobody writes.
    """

    setting: str
    load: str
    gates: list[int]
    beyond: list[int]
    between: Times | None
    during: Times | None


class Pauses(Struct):
    """Seconds from the death of the process that serves a device to the end of the first read after it."""

    setting: str
    seconds: list[float]


class Cost(Struct, frozen=True):
    """Bytes, for `writes` random writes of 4 KiB that overwrite a block for the first time each.

    `used`: of the storage, as `snapshot show` tells; the others are the kernel's own counts of the disks.
    """

    writes: int
    origin_read: int
    origin_written: int
    storage_read: int
    storage_written: int
    used: int


class Document(Struct):
    """Everything. `machine`, `settings`: what figures depend on, by name; `form` is `short` or `full`.

    `complete` once all that was to be measured is there. `load`: how many programs this machine ran, on an average, in
    the minutes before; None where nobody has looked.
    """

    started: str
    form: str
    machine: dict[str, str | int]
    settings: dict[str, str | int | float]
    speeds: list[CellRuns] = []
    held: list[CellRuns] = []
    gates: list[Gate] = []
    pauses: list[Pauses] = []
    cost: Cost | None = None
    left_out: list[LeftOut] = []
    complete: bool = False
    load: float | None = None

    @property
    def emulated(self) -> bool:
        """Whether requests cost so much more here than elsewhere that absolute figures say nothing."""
        return self.machine.get("guest") in ("uml", "tcg")

    @property
    def disturbed(self) -> bool:
        """Whether this machine had other things to do."""
        return self.load is not None and self.load > BUSY * int(self.machine.get("cpus", 1))


def read(path: Path) -> Document:
    """Raises msgspec.DecodeError for a file that holds none."""
    return msgspec.json.decode(path.read_bytes(), type=Document)


def to_json(document: Document) -> bytes:
    """On one line."""
    return msgspec.json.encode(document)
