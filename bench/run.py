# SPDX-License-Identifier: MIT
"""Measures everything on a kernel with ublk, and prints the result as JSON; `make bench` calls it, see main.py.

    python bench/run.py [--full] [--parts PATTERN] [--cells PATTERN] [--disks PATTERN] [--way WAY] >RESULT.json

What it is at goes to stderr. Needs root, ublk, null_blk, fio.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import gate, held, pause
from bench.cells import CELLS, DISKS, FIRST, GROUPS, RAM, Disk
from bench.document import Document, to_json
from bench.machine import machine
from bench.measure import Job
from bench.preserved import cost_of_first_overwrites
from bench.signals import exit_when_told
from bench.speeds import measure_group
from blksnap_ublk.client import Client
from tests.null_block import missing_for_null_blocks
from tests.own_daemon import own_daemon

MIB = 1 << 20
PARTS = ("speeds", "held", "gate", "pause", "bytes")
BEGIN, END = "-----BEGIN BENCH RESULT-----", "-----END BENCH RESULT-----"
"""Lines around the JSON with --marked."""


@dataclass(frozen=True)
class Form:
    """How much is measured: turns of each cell, seconds of a run at most, MiB of a disk, data ways.

    `slow_turns`: of cells in which a snapshot is taken between runs. `takes` of each setting, `deaths` likewise.
    """

    name: str
    turns: int
    slow_turns: int
    seconds: float
    mib: int
    ways: tuple[str, ...]
    takes: int
    deaths: int


SHORT = Form("short", 5, 3, 0.3, 64, ("auto",), 5, 3)
FULL = Form("full", 9, 9, 2.0, 256, ("auto", "copy"), 20, 10)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures speeds, and prints them as JSON.")
    parser.add_argument("--full", action="store_true", help="all cells, long enough for figures to be quoted")
    parser.add_argument("--parts", default="*", metavar="PATTERN", help=f"which of {', '.join(PARTS)}")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help="which fio jobs")
    parser.add_argument("--groups", default="*", metavar="PATTERN", help=f"which of {', '.join(GROUPS)}")
    parser.add_argument("--disks", default="*", metavar="PATTERN", help=f"which of {', '.join(d.name for d in DISKS)}")
    parser.add_argument("--way", choices=["auto", "copy", "zero-copy"], help="data way (auto; --full: auto and copy)")
    parser.add_argument("--turns", type=int, help="turns of each cell")
    parser.add_argument("--seconds", type=float, help="of one run, at most")
    parser.add_argument("--mib", type=int, help="size of each disk; up to 20 of them are in memory")
    parser.add_argument("--engine", default="io_uring", help="ioengine of fio (io_uring)")
    parser.add_argument("--marked", action="store_true", help="print what there is, again and again, between marks")
    return parser.parse_args()


def main() -> int:
    """The exit status."""
    options = parse()
    exit_when_told()
    missing = missing_for_null_blocks() or (None if os.path.exists("/dev/ublk-control") else "no ublk")
    if missing:
        print(f"bench: {missing}", file=sys.stderr)
        return 1
    for document in measure_all(options, FULL if options.full else SHORT):
        if options.marked:
            print(f"{BEGIN}\n{to_json(document).decode()}\n{END}", flush=True)
    if not options.marked:
        print(to_json(document).decode())
    return 0


def measure_all(options: argparse.Namespace, form: Form) -> Iterator[Document]:
    """All that the options ask for: the same document again and again, with more and more in it."""
    size = (options.mib or form.mib) * MIB
    job = Job(options.engine, options.seconds or form.seconds, size, 4 * size)
    settings: dict[str, str | int | float] = {
        "turns": options.turns or form.turns,
        "slow_turns": options.turns or form.slow_turns,
        "seconds": job.seconds,
        "MiB": size // MIB,
        "engine": job.engine,
    }
    document = Document(time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), form.name, machine(), settings)
    disks = [disk for disk in DISKS if fnmatch.fnmatch(disk.name, options.disks)]
    parts = fnmatch.filter(PARTS, options.parts)
    with own_daemon() as daemon, daemon.client() as client:
        for way in (options.way,) if options.way else form.ways:
            for disk in disks if "speeds" in parts else ():
                yield from measure_speeds(document, disk, options, form, job, way, client)
        for disk in [disk for disk in disks if options.full or disk is RAM] if "held" in parts else ():
            slow_turns = options.turns or form.slow_turns
            document.held += held.measure_held(disk, form.name, slow_turns, job, client)
            yield document
        if "gate" in parts:
            for found in gate.measure_gates(form.name, options.turns or form.takes, client):
                document.gates.append(found)
                yield document
        if "bytes" in parts:
            document.cost = cost_of_first_overwrites(job, client)
    if "pause" in parts:
        document.pauses = pause.measure_pauses(options.turns or form.deaths)
    document.complete = True
    yield document


def measure_speeds(
    document: Document, disk: Disk, options: argparse.Namespace, form: Form, job: Job, way: str, client: Client
) -> Iterator[Document]:
    """All groups of cells on one kind of disk."""
    for group in fnmatch.filter(GROUPS, options.groups):
        cells = [
            cell
            for cell in CELLS
            if cell.group == group
            and fnmatch.fnmatch(cell.job, options.cells)
            and (options.full or disk.name in cell.short)
        ]
        turns = options.turns or (form.slow_turns if group == FIRST else form.turns)
        if cells:
            found, left_out = measure_group(group, disk, cells, turns, job, way, client)
            document.speeds += found
            document.left_out += left_out
            yield document


if __name__ == "__main__":
    sys.exit(main())
