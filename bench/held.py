# SPDX-License-Identifier: MIT
"""Writes while many snapshots of a device are held, side by side with one: one copy serves all, so nothing may change.

Filtered devices on disks of their own: two with one snapshot each, which differ by noise alone, and some with more.
In each turn a newest snapshot of each device is taken; `first` overwrites all under it, `later` again what was
overwritten.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from bench.cells import Disk
from bench.contenders.contender import Contender
from bench.contenders.filtered import emptied
from bench.document import CellRuns, Speed
from bench.measure import Job, measure, write_all
from bench.progress import say
from bench.speeds import take_turns
from blksnap_ublk.client import Client
from tests.direct_io import write_at
from tests.null_block import null_block

CELLS = {"short": ("randwrite-4k-qd32",), "full": ("randwrite-4k-qd1", "randwrite-4k-qd32", "write-128k-qd8")}
"""By form."""
KINDS = ("first", "later")
HELD = {"1": 1, "another 1": 1, "8": 8, "50": 50}
"""How many snapshots each holds."""
BETWEEN = 32
"""Units that are overwritten between two of the many snapshots."""
UNIT = 4096


@dataclass
class Holder(Contender):
    """A filtered device; `older` are the snapshots that stay, to which a run adds the newest."""

    client: Client = field(kw_only=True)
    storage: str = field(kw_only=True)
    size: int = field(kw_only=True)
    older: list[str] = field(default_factory=list)

    @property
    def steady(self) -> bool:
        """It is not."""
        return False

    def hold(self, count: int) -> None:
        """Takes so many that stay, with some units overwritten after each."""
        dice = random.Random(count)
        for _ in range(count):
            self.older.append(self._take())
            for _ in range(BETWEEN):
                write_at(self.device, dice.randrange(self.size // UNIT) * UNIT, os.urandom(UNIT))

    def run(self, cell: str, job: Job) -> Speed:
        """One run under a newest snapshot. Raises RuntimeError when a snapshot did not last."""
        newest = self._take()
        try:
            if not cell.startswith("first-"):
                write_all(self.device, self.size)
            speed = measure(cell, self.device, job)
            states = {self.client.show_snapshot(snapshot).state.value for snapshot in [*self.older[-1:], newest]}
            if states != {"active"}:
                raise RuntimeError(f"{cell}: snapshots are {states}: nothing was measured")
            return speed
        finally:
            self.client.destroy_snapshots([newest])

    def _take(self) -> str:
        storage = f"@{self.older[0]}" if self.older else self.storage
        return self.client.create_snapshot([self.device], storage=[storage]).id


@contextmanager
def holders(disk: Disk, size: int, client: Client) -> Iterator[list[Holder]]:
    """One for each of HELD."""
    with ExitStack() as stack:
        origins = [stack.enter_context(null_block(size, delay_ns=disk.delay_ns)) for _ in HELD]
        storages = [stack.enter_context(null_block(4 * size, delay_ns=disk.delay_ns)) for _ in HELD]
        stack.enter_context(emptied(client))
        found = []
        for name, origin, storage in zip(HELD, origins, storages, strict=True):
            write_all(origin, size)
            device = client.attach(origin, queues=1).device
            found.append(Holder(name, device, client=client, storage=storage, size=size))
            found[-1].hold(HELD[name] - 1)
        yield found


def measure_held(disk: Disk, form: str, turns: int, job: Job, client: Client) -> list[CellRuns]:
    """First and later overwrites on one kind of disk; `client` is of a daemon that serves nothing."""
    found = []
    with holders(disk, job.size, client) as all_of_them:
        for kind in KINDS:
            for name in CELLS[form]:
                cell = f"first-{name}" if kind == "first" else name
                say(f"held snapshots, {disk.name}: {kind} {name}")
                runs, failures = take_turns(all_of_them, cell, turns, job)
                if failures:
                    raise RuntimeError("; ".join(failures.values()))
                found.append(CellRuns(kind, disk.name, "auto", name, runs))
    return found
