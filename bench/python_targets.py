# SPDX-License-Identifier: MIT
"""Requests per second of a target written in Python that does nothing, on the local transport, and what limits it.

    python bench/python_targets.py [--turns N] [--seconds S] [--profile]

One queue, one worker thread; requests are made in C by a thread that never takes the GIL. Beside it, in turn, the
engine's own null device with the same load. Writes JSON and Markdown to bench/results/, and the Markdown to stdout.
--profile: where the processor's time goes, by perf.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from msgspec import Struct

from bench.driver.local_load import Load, run_load
from bench.machine import machine
from bench.spread import spread, spread_of_ratios
from bench.stored import store
from blksnap_ublk import engine
from blksnap_ublk.engine import Op
from blksnap_ublk.ublk import PyTarget
from blksnap_ublk.ublk.pyservice import PyService

SIZE = 1 << 40
MAX_IO = 512 << 10
AIM = 50_000
PROBE = 2000
CELLS = [(Op.READ, 4096, 1), (Op.READ, 4096, 32), (Op.WRITE, 4096, 32), (Op.READ, 4096, 128), (Op.READ, 131072, 32)]
"""Op, length in bytes, requests at once."""
HOTTEST = 25


class Null(PyTarget):
    """Answers everything and does nothing."""

    size = SIZE

    def read(self, offset: int, buf: memoryview) -> None:
        pass

    def write(self, offset: int, buf: memoryview) -> None:
        pass

    def flush(self) -> None:
        pass


class Cell(Struct):
    """Requests per second turn by turn, and the processor's microseconds for one."""

    cell: str
    python: list[float]
    native: list[float]
    python_cpu_us: list[float]
    native_cpu_us: list[float]


class Document(Struct):
    """Everything; `machine` and `settings` by name. `hot`: lines of the profile."""

    machine: dict[str, str | int]
    settings: dict[str, str | int | float]
    cells: list[Cell]
    hot: list[str] = []


@contextmanager
def python_queue(thread: engine.Thread, depth: int) -> Iterator[engine.LocalQueue]:
    """A queue of the Python target, served by the framework's own worker."""
    service = PyService(Null())
    backend = service.begin(depth, MAX_IO)
    try:
        with engine.LocalQueue(thread, depth=depth, py=backend.py) as queue:
            yield queue
    finally:
        service.end()


@contextmanager
def native_queue(thread: engine.Thread, depth: int) -> Iterator[engine.LocalQueue]:
    """A queue of the engine's null device."""
    with engine.Device(size=SIZE) as device, engine.LocalQueue(thread, depth=depth, device=device) as queue:
        yield queue


QUEUES = {"python": python_queue, "native": native_queue}


def enough(queue: engine.LocalQueue, op: Op, length: int, depth: int, seconds: float) -> int:
    """How many requests take about so long."""
    requests = PROBE
    while (load := run_load(queue, op, length, depth, requests)).seconds < seconds / 4:
        requests *= 2
    return int(load.per_second * seconds)


def measure(op: Op, length: int, depth: int, turns: int, seconds: float) -> Cell:
    """Both in each turn, the other one first each time."""
    found: dict[str, list[Load]] = {name: [] for name in QUEUES}
    with engine.Thread() as thread:
        for turn in range(turns):
            for name in list(QUEUES)[:: 1 if turn % 2 else -1]:
                with QUEUES[name](thread, depth) as queue:
                    requests = enough(queue, op, length, depth, seconds)
                    found[name].append(run_load(queue, op, length, depth, requests))
    rates = {name: [load.per_second for load in loads] for name, loads in found.items()}
    cpu = {name: [load.cpu_seconds / load.requests * 1e6 for load in loads] for name, loads in found.items()}
    name = f"{op.name.lower()} {length >> 10}k, depth {depth}"
    return Cell(name, rates["python"], rates["native"], cpu["python"], cpu["native"])


def profile(seconds: float) -> list[str]:
    """Shares of the processor's time by library and by function, at depth 32. SystemExit where perf does not work."""
    if shutil.which("perf") is None:
        raise SystemExit("python_targets: --profile needs perf")
    op, length, depth = CELLS[1]
    with tempfile.TemporaryDirectory(prefix="blksnap-bench-") as temporary:
        data = Path(temporary) / "perf"
        with engine.Thread() as thread, python_queue(thread, depth) as queue:
            # So that perf tells it from the worker, which keeps the process's name.
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("load")
            requests = enough(queue, op, length, depth, seconds)
            with recorded(data):
                run_load(queue, op, length, depth, requests)
        return ["By thread and library:", *report(data, "comm,dso"), "", "By function:", *report(data, "dso,symbol")]


@contextmanager
def recorded(data: Path) -> Iterator[None]:
    """perf samples this process."""
    orders, answers = os.pipe(), os.pipe()
    control = f"--control=fd:{orders[0]},{answers[1]}"
    record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "1999", "-o", str(data), "--delay=-1", control]
    try:
        with subprocess.Popen([*record, "-p", str(os.getpid())], pass_fds=(orders[0], answers[1])) as perf:
            try:
                os.write(orders[1], b"enable\n")
                os.read(answers[0], 8)
                yield
            finally:
                perf.send_signal(signal.SIGINT)
    finally:
        for end in (*orders, *answers):
            os.close(end)


def report(data: Path, by: str) -> list[str]:
    """The largest shares."""
    command = ["perf", "report", "-i", str(data), "--stdio", "-q", "--no-children", "--sort", by]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [line.strip() for line in text.splitlines() if re.match(r"\s+\d", line)][:HOTTEST]


def to_markdown(document: Document) -> str:
    said = [f"{name} {value}" for name, value in {**document.machine, **document.settings}.items()]
    lines = ["# Python targets", "", "; ".join(said) + ".", ""]
    lines += [
        f"Requests per second and queue of a null target: median (quartiles); the aim is {AIM} at some depth.",
        "",
    ]
    lines += [
        "| cell | Python, 1000/s | / engine's null device | µs of processor: Python, engine |",
        "|---|---|---|---|",
    ]
    for cell in document.cells:
        rate = spread([value / 1000 for value in cell.python])
        cpu = f"{statistics.median(cell.python_cpu_us):.1f}, {statistics.median(cell.native_cpu_us):.1f}"
        lines.append(f"| {cell.cell} | {rate} | {spread_of_ratios(cell.python, cell.native)} | {cpu} |")
    if document.hot:
        lines += ["", "```", *document.hot, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Speed of a null target written in Python.")
    parser.add_argument("--turns", type=int, default=5, help="of each cell (5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one run (1)")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, by perf")
    options = parser.parse_args()
    settings: dict[str, str | int | float] = {"turns": options.turns, "seconds": options.seconds}
    document = Document(machine(), settings, [measure(*cell, options.turns, options.seconds) for cell in CELLS])
    if options.profile:
        document.hot = profile(max(options.seconds, 3.0))
    store("python-targets", document, to_markdown(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
