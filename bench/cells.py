# SPDX-License-Identifier: MIT
"""What is measured: cells, each a fio job of `jobs/`, in groups whose contenders are set up together."""

from __future__ import annotations

from dataclasses import dataclass

WRITES = "writes"
FIRST = "first overwrites"
READS = "reads"
READS_BUSY = "reads while the origin is written"


@dataclass(frozen=True)
class Cell:
    """`short`: part of the short form, on the disks so named."""

    group: str
    job: str
    short: tuple[str, ...] = ()


@dataclass(frozen=True)
class Disk:
    """A kind of disk: `delay_ns` until a request completes, None for at once."""

    name: str
    delay_ns: int | None


RAM = Disk("RAM disk", None)
SLOW = Disk("100 µs disk", 100_000)
DISKS = (RAM, SLOW)
BOTH = (RAM.name, SLOW.name)

CELLS = (
    Cell(WRITES, "randwrite-4k-qd1", BOTH),
    Cell(WRITES, "randwrite-4k-qd32", BOTH),
    Cell(WRITES, "write-128k-qd8", (RAM.name,)),
    Cell(WRITES, "write-1m-qd4"),
    Cell(WRITES, "randrw-4k-qd32"),
    Cell(FIRST, "first-randwrite-4k-qd1"),
    Cell(FIRST, "first-randwrite-4k-qd32", (RAM.name,)),
    Cell(FIRST, "first-write-128k-qd8"),
    Cell(FIRST, "first-write-1m-qd4"),
    Cell(FIRST, "spread-write-4k-qd1", BOTH),
    Cell(FIRST, "spread-write-4k-qd32", BOTH),
    Cell(READS, "randread-4k-qd1", (RAM.name,)),
    Cell(READS, "randread-4k-qd32", (RAM.name,)),
    Cell(READS, "read-128k-qd8"),
    Cell(READS, "read-1m-qd4"),
    Cell(READS_BUSY, "randread-4k-qd1"),
    Cell(READS_BUSY, "randread-4k-qd32", (RAM.name,)),
)
GROUPS = tuple(dict.fromkeys(cell.group for cell in CELLS))
