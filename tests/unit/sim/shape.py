# SPDX-License-Identifier: MIT
"""What a simulated world is made of, before anything happens in it."""

from __future__ import annotations

from dataclasses import dataclass

SECTOR = 512


@dataclass(frozen=True)
class Shape:
    """Sizes in bytes; `storages`: units of each area of each storage; `disks` share the storages and the threads."""

    unit: int = 4096
    units: int = 9
    odd_sectors: int = 3
    """The last unit has that many sectors; 0: it is whole."""
    tracking_block: int = 4096
    disks: int = 1
    threads: int = 2
    queues: int = 2
    """Of each disk; they are put on the threads in turn."""
    depth: int = 6
    zero_copy: bool = True
    storages: tuple[tuple[int, ...], ...] = ((1000,),)
    pool: int = 2 << 20
    early: bool = False
    """Whether writes go on when the old data is in a buffer: buffers outlive a process."""
    map_memory: bool = True
    """Whether there is any at the beginning."""

    @property
    def size(self) -> int:
        """Of each disk."""
        return self.units * self.unit - (self.unit - self.odd_sectors * SECTOR if self.odd_sectors else 0)


GEOMETRIES: tuple[dict[str, int], ...] = (
    {},
    {"units": 3, "odd_sectors": 0, "tracking_block": 8192},
    {"unit": 512, "units": 80, "odd_sectors": 0, "tracking_block": 4096},
    {"unit": 512, "units": 700, "odd_sectors": 0, "tracking_block": 4096},
    {"unit": 8192, "units": 12, "odd_sectors": 15, "tracking_block": 65536},
    {"units": 70, "odd_sectors": 1, "tracking_block": 16384},
    {"units": 300, "odd_sectors": 7, "tracking_block": 65536},
    {"unit": 65536, "units": 20, "odd_sectors": 9, "tracking_block": 65536},
)
"""Small ones first: failures are easiest to understand there. The last two are larger than a copy, and the pool."""

TWO_TABLES = {"unit": 512, "units": 65536 + 200, "odd_sectors": 0, "tracking_block": 65536}
"""65536 units belong to one table of a map: slow, because everything of it is looked at after each step."""

STORAGES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((1000,),),
    ((7, 1, 2, 500), (3, 400)),
    ((2, 1, 1, 9),),
    ((1,) * 60, (300,)),
    ((400,), (400,), (5,)),
    ((40, 3, 100), (7, 200), (90,), (1, 300)),
    ((), (1,), (60,)),
    ((4,), (2, 3)),
    ((), ()),
)
