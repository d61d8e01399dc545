# SPDX-License-Identifier: MIT
"""The kernel's dm-snapshot, not persistent: the origin, and a snapshot of it whose chunks are kept on another disk."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.contenders.contender import Contender, Unavailable
from bench.document import Speed
from bench.measure import Job, measure
from tests.device_mapper import mapped_table, missing_for_targets

CHUNKS_KIB = (4, 64, 256)
SECTOR = 512
MARGIN = 8 << 20
"""Bytes of a disk for chunks beyond what they need."""

_numbers = itertools.count()


def check_dm_snapshot() -> None:
    """Raises Unavailable."""
    missing = missing_for_targets("snapshot")
    if missing:
        raise Unavailable(missing)


def name_of(chunk_kib: int) -> str:
    """The contender's name."""
    return f"dm-{chunk_kib}k"


@contextmanager
def held_snapshot(origin: str, chunks: str, chunk_kib: int) -> Iterator[str]:
    """The path of the origin's device while a fresh snapshot of it is held.

    Raises RuntimeError at the end if the snapshot did not last: nothing was measured then.
    """
    number = f"bench{os.getpid()}n{next(_numbers)}"
    sectors = _sectors(origin)
    table = f"0 {sectors} snapshot {origin} {chunks} N {chunk_kib * 1024 // SECTOR}"
    with mapped_table(f"{number}s", table), mapped_table(f"{number}o", f"0 {sectors} snapshot-origin {origin}") as top:
        yield top.path
        command = ["dmsetup", "status", f"{number}s"]
        status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if "/" not in status:
            raise RuntimeError(f"the dm snapshot with chunks of {chunk_kib} KiB did not last: {status.strip()}")


@dataclass
class FirstDmOverwrites(Contender):
    """`device` is the origin: its snapshot is made anew before each run."""

    chunks: str = field(kw_only=True)
    chunk_kib: int = field(kw_only=True)

    @property
    def steady(self) -> bool:
        """It is not."""
        return False

    def run(self, cell: str, job: Job) -> Speed:
        """A run of a job that writes no block twice."""
        with held_snapshot(self.device, self.chunks, self.chunk_kib) as top:
            return measure(cell, top, job)


def _sectors(disk: str) -> int:
    command = ["blockdev", "--getsz", disk]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
