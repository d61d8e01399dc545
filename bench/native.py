# SPDX-License-Identifier: MIT
"""The engine on files, without a kernel's ublk, side by side with fio and with the least code that does the same I/O.

    python bench/native.py [--directory DIR …] [--short] [--cells PATTERN]

| contender | |
|---|---|
| `fio` | on the origin's file: io_uring, O_DIRECT, the same depth and length |
| `plain` | the same by the driver's own loop on io_uring |
| `idle` | the filter, tracking; requests are made by the queue's thread, as ublk would |
| `local` | the same, requests of another thread through the local transport |
| `later` | the filter with a snapshot that has everything already |
| `image` | the image of a snapshot under which nothing was overwritten |
| `first` | the filter with a snapshot: every write preserves |
| `serial` | floor of it: read the origin, write the storage, write the origin |
| `early` | floor of it: read the origin, then write both; a request ends with the origin's write |

Writes JSON and Markdown to bench/results/, and the Markdown to stdout. Needs fio and 2.5 GiB in each directory.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from msgspec import Struct

from bench import driver
from bench.document import Speed
from bench.machine import machine
from bench.spread import spread_of_ratios
from bench.stored import store

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SPARE = 64 * MIB
"""Of the storage beyond the area, as the driver wants it."""
PROBE = 2048
"""Requests that tell how many make a run."""


class Run(Speed, frozen=True):
    """`cpu_us`: processor time of a request, in user space and in system calls; fio's own figure is not used."""

    cpu_us: float | None


class Kind(Struct, frozen=True):
    """What is done to the first `area` bytes of the origin's file, by whom, and who is compared with whom."""

    op: str
    area: int
    contenders: dict[str, driver.Options]
    pairs: tuple[tuple[str, str], ...]


FIO = "fio"
BY_QUEUE: driver.Options = {"by": "queue"}
BY_LOCAL: driver.Options = {"by": "local"}
PLAIN: driver.Options = {"by": "plain"}

KINDS = {
    "read": Kind(
        "read",
        GIB,
        {FIO: {}, "plain": PLAIN, "idle": BY_QUEUE, "local": BY_LOCAL, "image": {"held": 1, "target": "image"}},
        (("idle", FIO), ("idle", "plain"), ("local", FIO), ("image", "idle")),
    ),
    # Small: it is filled before each run of `later`.
    "write": Kind(
        "write",
        64 * MIB,
        {FIO: {}, "plain": PLAIN, "idle": BY_QUEUE, "local": BY_LOCAL, "later": {"held": 1, "filled": 1}},
        (("idle", FIO), ("idle", "plain"), ("local", FIO), ("later", "idle")),
    ),
    "first overwrite": Kind(
        "write",
        GIB,
        {"serial": {"by": "serial"}, "early": {"by": "early"}, "first": {"held": 1}},
        (("first", "serial"), ("first", "early")),
    ),
}


class Shape(Struct, frozen=True):
    """Length in bytes, requests at once, and their order."""

    length: int
    depth: int
    order: str

    def __str__(self) -> str:
        return f"{self.order} {self.length // KIB}k, depth {self.depth}"


SHAPES = (Shape(4 * KIB, 1, "random"), Shape(4 * KIB, 32, "random"), Shape(128 * KIB, 8, "sequential"))


class Cell(Struct):
    """The speeds of each contender, turn by turn."""

    directory: str
    kind: str
    shape: str
    requests: int
    runs: dict[str, list[Run]]


class Document(Struct):
    """Everything; `machine` and `settings` by name."""

    machine: dict[str, str | int]
    settings: dict[str, str | int | float]
    cells: list[Cell]


def make_files(directory: Path) -> driver.Options:
    """Random bytes on all of both: no write of a run allocates anything."""
    files: driver.Options = {}
    for name, size in (("origin", GIB), ("storage", GIB + SPARE)):
        path = directory / name
        command = ["dd", "if=/dev/urandom", f"of={path}", "bs=1M", f"count={size // MIB}", "status=none"]
        subprocess.run([*command, "conv=fsync"], check=True, timeout=driver.LIMIT)
        files[name] = str(path)
    return files


def by_fio(path: str, op: str, area: int, shape: Shape, requests: int) -> Run:
    """RuntimeError with fio's words when it fails."""
    rw = {"random": f"rand{op}", "sequential": op}[shape.order]
    options = {
        "name": "native",
        "filename": path,
        "ioengine": "io_uring",
        "direct": 1,
        "rw": rw,
        "bs": shape.length,
        "iodepth": shape.depth,
        "size": area,
        "io_size": requests * shape.length,
        "randrepeat": 0,
        "allow_file_create": 0,
        # from before the system call that submits, as the driver's
        "lat_percentiles": 1,
        "clat_percentiles": 0,
        "output-format": "json",
    }
    command = ["fio", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=driver.LIMIT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout[-500:]}")
    # fio may say something before its document.
    found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][op]
    percentiles = found["lat_ns"]["percentile"]
    return Run(found["iops"], percentiles["50.000000"] / 1000, percentiles["99.000000"] / 1000, None)


def by_driver(files: driver.Options, kind: Kind, shape: Shape, options: driver.Options, requests: int) -> Run:
    run = driver.run(
        {
            **files,
            "op": kind.op,
            "area": kind.area,
            "length": shape.length,
            "depth": shape.depth,
            "order": shape.order,
            "requests": requests,
            "timed": 1,
            **options,
        }
    )
    return Run(run.per_second, run.p50_ns / 1000, run.p99_ns / 1000, run.cpu_ns / 1000 / requests)


def measure(directory: Path, files: driver.Options, kind: str, shape: Shape, turns: int, seconds: float) -> Cell:
    """All contenders in each turn, each time another one first; as many requests as take the slowest `seconds`."""
    what = KINDS[kind]

    def speed(name: str, requests: int) -> Run:
        if name == FIO:
            return by_fio(str(files["origin"]), what.op, what.area, shape, requests)
        return by_driver(files, what, shape, what.contenders[name], requests)

    names = list(what.contenders)
    slowest = min(speed(name, PROBE).iops for name in names)
    requests = max(PROBE, int(slowest * seconds))
    if kind == "first overwrite":
        requests = min(requests, what.area // shape.length)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(speed(name, requests))
    print(f"{directory}: {kind}, {shape}: {requests} requests", file=sys.stderr, flush=True)
    return Cell(str(directory), kind, str(shape), requests, runs)


def file_system(directory: Path) -> str:
    """Its type."""
    command = ["findmnt", "-n", "-o", "FSTYPE", "-T", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def to_markdown(document: Document) -> str:
    """Tables of ratios, one for each directory and kind."""
    said = [f"{name} {value}" for name, value in {**document.machine, **document.settings}.items()]
    lines = ["# The engine on files", "", "; ".join(said) + ".", ""]
    lines += [
        "Ratios of runs in turn, median (quartiles): of requests per second, of the time of the middle request, and",
        "of the processor's time for one. More than 1 is better in each.",
    ]
    for directory, kind in dict.fromkeys((cell.directory, cell.kind) for cell in document.cells):
        cells = [cell for cell in document.cells if (cell.directory, cell.kind) == (directory, kind)]
        pairs = KINDS[kind].pairs
        lines += ["", f"## {kind}, {directory}", "", "| cell | | " + " | ".join(f"{a}/{b}" for a, b in pairs) + " |"]
        lines.append("|---" * (2 + len(pairs)) + "|")
        for cell in cells:
            for name, of in GOODNESS.items():
                shown = [compare(cell.runs[a], cell.runs[b], of) for a, b in pairs]
                lines.append(f"| {cell.shape} | {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


GOODNESS: dict[str, Callable[[Run], float | None]] = {
    "requests/s": lambda run: run.iops,
    "p50": lambda run: 1 / run.p50_us,
    "processor": lambda run: 1 / run.cpu_us if run.cpu_us else None,
}
"""What runs are compared by; None where it was not measured."""


def compare(one: Sequence[Run], other: Sequence[Run], of: Callable[[Run], float | None]) -> str:
    """A ratio with its spread; nothing where one of them has none."""
    pairs = [(of(a), of(b)) for a, b in zip(one, other, strict=True)]
    found = [(a, b) for a, b in pairs if a and b]
    return str(spread_of_ratios([a for a, _ in found], [b for _, b in found])) if found else ""


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="The engine on files, side by side with fio.")
    parser.add_argument("--directory", type=Path, nargs="*", default=[Path("/var/tmp"), Path("/dev/shm")])
    parser.add_argument("--short", action="store_true", help="three turns of half a second; larger spread")
    parser.add_argument("--turns", type=int, help="turns of each cell (9; 3 with --short)")
    parser.add_argument("--seconds", type=float, help="of one run (2; 0.5 with --short)")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help="such as 'first*' or '*4k, depth 1'")
    options = parser.parse_args()
    turns = options.turns or (3 if options.short else 9)
    seconds = options.seconds or (0.5 if options.short else 2.0)
    settings: dict[str, str | int | float] = {"turns": turns, "seconds": seconds}
    document = Document(machine(), settings, [])
    for parent in options.directory:
        settings[str(parent)] = file_system(parent)
        with tempfile.TemporaryDirectory(prefix="blksnap-bench-", dir=parent) as temporary:
            files = make_files(Path(temporary))
            for kind in KINDS:
                for shape in SHAPES:
                    if fnmatch.fnmatch(f"{kind}, {shape}", options.cells):
                        document.cells.append(measure(parent, files, kind, shape, turns, seconds))
    store("native", document, to_markdown(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
