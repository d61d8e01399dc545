# SPDX-License-Identifier: MIT
"""Speeds of the filter, side by side with a plain loop target and the raw disk, on a kernel with ublk.

    python bench/run.py [--short] [--way copy|zero-copy|auto] [--cells PATTERN]

Writes JSON and Markdown to bench/results/, and the Markdown to stdout. Needs root, ublk, null_blk, fio.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.contenders import RAM, SLOW, Contender, Disk, contenders
from bench.measure import Job, Speed
from bench.preserved import cost_of_first_overwrites
from bench.report import Results
from tests.null_block import missing_for_null_blocks

CELLS = [
    "randwrite-4k-qd1",
    "randwrite-4k-qd32",
    "randread-4k-qd1",
    "randread-4k-qd32",
    "write-128k-qd8",
    "read-128k-qd8",
]
SHORT_CELLS_OF_SLOW_DISK = ["randwrite-4k-qd1", "randwrite-4k-qd32"]
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Speeds as ratios of runs in turn.")
    parser.add_argument("--short", action="store_true", help="about three minutes; larger spread")
    parser.add_argument("--way", choices=["auto", "copy", "zero-copy"], default="auto", help="data way (auto)")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help=f"which of {', '.join(CELLS)}")
    parser.add_argument("--turns", type=int, help="turns of each cell (9; 3 with --short)")
    parser.add_argument("--seconds", type=float, help="of one run (5; 0.5 with --short)")
    parser.add_argument("--mib", type=int, help="size of each disk (256; 64 with --short); 9 of them are in memory")
    parser.add_argument("--engine", default="io_uring", help="ioengine of fio (io_uring)")
    options = parser.parse_args()
    turns = options.turns or (3 if options.short else 9)
    size = (options.mib or (64 if options.short else 256)) << 20
    job = Job(options.engine, options.seconds or (0.5 if options.short else 5.0), size)
    missing = missing_for_null_blocks() or (None if os.path.exists("/dev/ublk-control") else "no ublk")
    if missing:
        print(f"bench: {missing}", file=sys.stderr)
        return 1
    settings = {
        "data way": options.way,
        "turns": turns,
        "seconds": job.seconds,
        "MiB": size >> 20,
        "engine": job.engine,
    }
    results = Results(settings)
    for disk in (RAM, SLOW):
        cells = SHORT_CELLS_OF_SLOW_DISK if options.short and disk is SLOW else CELLS
        results.runs[disk.name] = measure_disk(disk, fnmatch.filter(cells, options.cells), turns, job, options.way)
    results.cost = cost_of_first_overwrites(size)
    RESULTS.mkdir(exist_ok=True)
    name = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.uname().release}"
    (RESULTS / f"{name}.json").write_text(results.to_json())
    (RESULTS / f"{name}.md").write_text(results.to_markdown())
    print(results.to_markdown())
    print(f"bench: {RESULTS / name}.json and .md", file=sys.stderr)
    return 0


def measure_disk(disk: Disk, cells: list[str], turns: int, job: Job, way: str) -> dict[str, dict[str, list[Speed]]]:
    """For each cell the speeds of each contender, turn by turn: A B C A B C …"""
    with contenders(disk, job.size, way) as all_of_them:
        found: dict[str, dict[str, list[Speed]]] = {}
        for cell in cells:
            print(f"bench: {disk.name}: {cell}", file=sys.stderr, flush=True)
            able = [contender for contender in all_of_them if takes(contender, cell)]
            speeds: dict[str, list[Speed]] = {contender.name: [] for contender in able}
            for _ in range(turns):
                for contender in able:
                    speeds[contender.name].append(contender.run(cell, job))
            found[cell] = speeds
        return found


def takes(contender: Contender, cell: str) -> bool:
    """Whether the cell makes sense for the contender."""
    return contender.reads if "read" in cell else contender.writes


if __name__ == "__main__":
    sys.exit(main())
