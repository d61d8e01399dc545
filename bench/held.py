# SPDX-License-Identifier: MIT
"""Writes while many snapshots of a device are held, side by side with one: one copy serves all, so nothing may change.

    python bench/held.py [--held N] [--turns N] [--seconds S] [--mib N] [--cells PATTERN]

Three filtered devices on disks of their own: two with one snapshot each, which differ by noise alone, and one with N.
In each turn a newest snapshot of each device is taken; `first` overwrites all under it, `later` again what was
overwritten. Writes JSON and Markdown to bench/results/, and the Markdown to stdout. Needs root, ublk, null_blk, fio.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.contenders import RAM, SLOW, Disk
from bench.measure import Job, Speed, measure, write_all
from bench.report import machine, ratio
from blksnap_ublk.client import Client
from tests.direct_io import write_at
from tests.null_block import missing_for_null_blocks, null_block
from tests.own_daemon import own_daemon

CELLS = ["randwrite-4k-qd1", "randwrite-4k-qd32", "write-128k-qd8"]
KINDS = ["first", "later"]
NAMES = ["one", "another one", "many"]
BETWEEN = 32
"""Units that are overwritten between two of the many snapshots."""
UNIT = 4096
RESULTS = Path(__file__).parent / "results"

Runs = dict[str, dict[str, list[Speed]]]
"""For each cell the speeds of each of NAMES, turn by turn."""


@dataclass
class Holder:
    """A filtered device of `size` bytes; `older` are the snapshots that stay, to which a run adds the newest."""

    client: Client
    device: str
    storage: str
    size: int
    older: list[str]

    def hold(self, count: int) -> None:
        """Takes so many that stay, with some units overwritten after each."""
        dice = random.Random(count)
        for _ in range(count):
            self.older.append(self._take())
            for _ in range(BETWEEN):
                write_at(self.device, dice.randrange(self.size // UNIT) * UNIT, os.urandom(UNIT))

    def run(self, kind: str, cell: str, job: Job) -> Speed:
        """One run under a newest snapshot. Raises RuntimeError when a snapshot did not last."""
        newest = self._take()
        try:
            if kind == "later":
                write_all(self.device, self.size)
            speed = measure(f"first-{cell}" if kind == "first" else cell, self.device, job)
            states = {self.client.show_snapshot(snapshot).state.value for snapshot in [*self.older[-1:], newest]}
            if states != {"active"}:
                raise RuntimeError(f"{kind} {cell}: snapshots are {states}: nothing was measured")
            return speed
        finally:
            self.client.destroy_snapshots([newest])

    def _take(self) -> str:
        storage = f"@{self.older[0]}" if self.older else self.storage
        return self.client.create_snapshot([self.device], storage=[storage]).id


@contextmanager
def holders(disk: Disk, size: int, held: int) -> Iterator[list[Holder]]:
    """One for each of NAMES."""
    with ExitStack() as stack:
        # All disks before the daemon, which must let them go before they are taken down.
        origins = [stack.enter_context(null_block(size, delay_ns=disk.delay_ns)) for _ in NAMES]
        storages = [stack.enter_context(null_block(4 * size, delay_ns=disk.delay_ns)) for _ in NAMES]
        client = stack.enter_context(stack.enter_context(own_daemon()).client())
        found = []
        for origin, storage in zip(origins, storages, strict=True):
            write_all(origin, size)
            found.append(Holder(client, client.attach(origin, queues=1).device, storage, size, []))
        found[-1].hold(held - 1)
        yield found


def measure_disk(disk: Disk, cells: list[str], turns: int, job: Job, held: int) -> dict[str, Runs]:
    """For each kind of overwrite its runs: A B C, then C B A, and so on."""
    with holders(disk, job.size, held) as all_of_them:
        found: dict[str, Runs] = {}
        for kind in KINDS:
            found[kind] = {}
            for cell in cells:
                print(f"held: {disk.name}: {kind} {cell}", file=sys.stderr, flush=True)
                speeds: dict[str, list[Speed]] = {name: [] for name in NAMES}
                order = list(zip(NAMES, all_of_them, strict=True))
                for _ in range(turns):
                    for name, holder in order:
                        speeds[name].append(holder.run(kind, cell, job))
                    order.reverse()
                found[kind][cell] = speeds
        return found


def to_markdown(settings: dict[str, object], results: dict[str, dict[str, Runs]]) -> str:
    """Tables of ratios, one for each disk."""
    said = [f"{name} {value}" for name, value in {**machine(), **settings}.items()]
    lines = ["# One snapshot and many", "", "; ".join(said) + ".", ""]
    lines += ["Requests per second as ratios of runs in turn: median (least–most).", ""]
    for disk, kinds in results.items():
        lines += [f"## {disk}", "", "| overwrites | one, requests/s | another one/one | many/one | p99 µs: one, many |"]
        lines.append("|---|---|---|---|---|")
        for kind, cells in kinds.items():
            for cell, speeds in cells.items():
                one, other, many = (speeds[name] for name in NAMES)
                middle = sorted(speed.iops for speed in one)[len(one) // 2]
                p99 = [sorted(speed.p99_us for speed in each)[len(each) // 2] for each in (one, many)]
                lines.append(
                    f"| {kind} {cell} | {middle:.0f} | {ratio(other, one)} | {ratio(many, one)} "
                    f"| {p99[0]:.0f}, {p99[1]:.0f} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Writes under many snapshots and under one, in turn.")
    parser.add_argument("--held", type=int, default=50, help="how many are many (50)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each cell (7)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one run (3)")
    parser.add_argument("--mib", type=int, default=64, help="size of each disk (64); 15 times that is in memory")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help=f"which of {', '.join(CELLS)}")
    parser.add_argument("--engine", default="io_uring", help="ioengine of fio (io_uring)")
    options = parser.parse_args()
    missing = missing_for_null_blocks() or (None if os.path.exists("/dev/ublk-control") else "no ublk")
    if missing:
        print(f"held: {missing}", file=sys.stderr)
        return 1
    job = Job(options.engine, options.seconds, options.mib << 20)
    cells = fnmatch.filter(CELLS, options.cells)
    settings: dict[str, object] = {
        "many": options.held,
        "turns": options.turns,
        "seconds": job.seconds,
        "MiB": options.mib,
    }
    results = {disk.name: measure_disk(disk, cells, options.turns, job, options.held) for disk in (RAM, SLOW)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"held-{time.strftime('%Y%m%dT%H%M%S')}-{os.uname().release}"
    document = {"settings": settings, "machine": machine(), "runs": results}
    path.with_name(path.name + ".json").write_text(json.dumps(document, default=asdict))
    text = to_markdown(settings, results)
    path.with_name(path.name + ".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
