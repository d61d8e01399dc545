# SPDX-License-Identifier: MIT
"""Time and memory of change tracking: "changed since" on large devices, with few and with many changes.

    python bench/cbt_query.py [--tib 1 16 64] [--dense-tib 1] [--directory /dev/shm]

Each query is asked in turn with a pass of numpy over as many bytes of ordinary memory as the state occupies: the
speed of memory, which no query that looks at all can beat. Times are wall time and the processor's; the latter says
more on a busy machine. State is measured in allocated blocks of its tmpfs after all queries, so that what a query
allocates by touching it is seen. `idle` is a device without a snapshot: its bitmaps, and what the engine adds to the
process. Writes JSON and Markdown to bench/results/, and the Markdown to stdout.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bench.machine import machine
from bench.spread import Spread, spread_of_ratios
from bench.stored import store
from blksnap_ublk import engine
from blksnap_ublk.cbt import Cursor, History
from blksnap_ublk.cbt.geometry import TRACKING_BLOCK_DEFAULT
from blksnap_ublk.snapshot.state_files import StateFiles, swallowed_bytes

TIB, MIB = 1 << 40, 1 << 20
SCATTERED = 20_000
DENSE_RUN = 37
DENSE_TAKES = 18
REPEATS = 7
SEED = 1
AIM_SECONDS = 0.1
AIM_TIB = 16
AIM_MIB_PER_TIB = 40


class Query(Struct):
    """Seconds of wall time and of the processor, repeat by repeat, of a query and of the pass next to it.

    `first`: seconds of the first call, not among the others.
    """

    first: float
    wall: list[float]
    cpu: list[float]
    pass_cpu: list[float]

    @property
    def ratio(self) -> Spread:
        """The query in units of the pass, by processor time."""
        return spread_of_ratios(self.cpu, self.pass_cpu)


class Case(Struct):
    """One size and workload. Memory in bytes; `engine_idle`: private memory of the process for the device itself."""

    workload: str
    tib: int
    blocks: int
    held: int
    files_idle: int
    engine_idle: int
    files_after_folds: int
    files_with_held: int
    longest_fold: float
    queries: dict[str, Query]
    ranges: int
    changed_bytes: int
    peak_process: int = 0

    @property
    def idle_per_tib(self) -> float:
        """MiB."""
        return (self.files_idle + self.engine_idle) / self.tib / MIB


class Document(Struct):
    """Everything; `machine` and `settings` by name."""

    machine: dict[str, str | int]
    settings: dict[str, str | int | float]
    cases: list[Case]


def mark(history: History, blocks: NDArray[np.int64] | None) -> None:
    """Set bits (None: all) as the process that does the I/O would."""
    bitmap = history.active
    descriptor = bitmap.open()
    mapping = mmap.mmap(descriptor, bitmap.length)
    os.close(descriptor)
    content = np.frombuffer(mapping, np.uint8)
    if blocks is None:
        content[: -(-history.blocks // 8)] = 0xFF
    else:
        np.bitwise_or.at(content, blocks // 8, (1 << blocks % 8).astype(np.uint8))


def take(history: History, blocks: NDArray[np.int64] | None) -> int:
    mark(history, blocks)
    history.prepare()
    history.commit(history.number + 1)
    return history.number


def cpu_seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall time and the processor's."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def ask(call: Callable[[], object], memory: NDArray[np.uint64]) -> Query:
    """A query and a pass over `memory`, in turn."""
    query = Query(cpu_seconds(call)[0], [], [], [])
    for _ in range(REPEATS):
        query.pass_cpu.append(cpu_seconds(memory.max)[1])
        wall, cpu = cpu_seconds(call)
        query.wall.append(wall)
        query.cpu.append(cpu)
    return query


def occupied(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def private_memory() -> int:
    """Bytes of this process that are no file's."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def engine_idle(history: History, directory: Path, size: int) -> int:
    """What a filtered device that serves a queue adds to a process that has a queue thread already."""
    files = StateFiles(directory)
    descriptors = [history.active.open(), files.create("swallowed", swallowed_bytes(size, TRACKING_BLOCK_DEFAULT))]
    mappings = [mmap.mmap(descriptor, 0) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    with tempfile.TemporaryFile() as backing, engine.File(backing.fileno()) as origin, engine.Thread() as thread:
        before = private_memory()
        device = engine.Device(
            size=size, tracking_block=TRACKING_BLOCK_DEFAULT, origin=origin, bitmap=mappings[0], swallowed=mappings[1]
        )
        with device, engine.LocalQueue(thread, device=device, depth=128) as queue:
            queue.flush()
            return private_memory() - before


def measure(
    workload: str, tib: int, directory: Path, changes: list[NDArray[np.int64] | None], history: History, held: int
) -> Case:
    """A base folded from several snapshots, then `held` snapshots that stay."""
    of_engine = engine_idle(history, directory, tib * TIB)
    idle = occupied(directory)
    fold_time = 0.0
    for blocks in changes:
        number = take(history, blocks)
        history.destroy(number)
        fold_time = max(fold_time, cpu_seconds(history.fold)[1])
    after_fold = occupied(directory)
    base = history.number
    for _ in range(held):
        take(history, changes[-1])
    history.fold()
    memory = np.ones(max(occupied(directory) // 8, 1), np.uint64)
    since = {
        "ever": None,
        "before the held": Cursor(history.generation, base),
        "the last": Cursor(history.generation, history.number - 1),
    }
    queries = {name: ask(partial(history.changes, cursor), memory) for name, cursor in since.items()}
    answer = history.changes(None)
    return Case(
        workload=workload,
        tib=tib,
        blocks=history.blocks,
        held=held,
        files_idle=idle,
        engine_idle=of_engine,
        files_after_folds=after_fold,
        files_with_held=occupied(directory),
        longest_fold=fold_time,
        queries=queries,
        ranges=len(answer.ranges),
        changed_bytes=answer.changed_bytes,
    )


def scattered(history: History, chance: np.random.Generator) -> list[NDArray[np.int64] | None]:
    return [chance.integers(0, history.blocks, SCATTERED) for _ in range(4)]


def dense(history: History, chance: np.random.Generator) -> list[NDArray[np.int64] | None]:
    """Everything written again and again, then pieces of it: the array is as large as it can be."""
    pieces = [np.arange(0, history.blocks, DENSE_RUN, dtype=np.int64) + shift for shift in range(3)]
    return [*[None] * DENSE_TAKES, *(piece[piece < history.blocks] for piece in pieces)]


WORKLOADS = {"scattered": scattered, "dense": dense}


def run_case(workload: str, tib: int, held: int, parent: Path) -> Case:
    """One case, in a process of its own so that its memory is its own."""
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        directory = Path(temporary)
        history = History.create(directory, tib * TIB)
        changes = WORKLOADS[workload](history, np.random.default_rng(SEED))
        case = measure(workload, tib, directory, changes, history, held)
    case.peak_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return case


def to_markdown(document: Document) -> str:
    """Tables of times and of memory."""
    said = [f"{name} {value}" for name, value in {**document.machine, **document.settings}.items()]
    lines = ["# Queries and memory", "", "; ".join(said) + ".", ""]
    lines += [
        f"Milliseconds, the least of {REPEATS}: wall time and the processor's; the latter also in units of a pass of"
        f" numpy over as many bytes as the state has, median (quartiles). Aim: {AIM_SECONDS * 1000:.0f} ms at"
        f" {AIM_TIB} TiB.",
        "",
        "| changes | TiB | since | wall ms | processor ms | / pass | ranges |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in document.cases:
        for name, query in case.queries.items():
            wall, cpu = min(query.wall) * 1000, min(query.cpu) * 1000
            shown = f"{name} | {wall:.1f} | {cpu:.1f} | {query.ratio} | {case.ranges if name == 'ever' else ''}"
            lines.append(f"| {case.workload} | {case.tib} | {shown} |")
    lines += [
        "",
        f"Memory in MiB for each TiB. Aim: {AIM_MIB_PER_TIB} for an idle device.",
        "",
        "| changes | TiB | idle | of it the engine | with an array of changes | and snapshots held | longest fold ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in document.cases:
        per = [case.engine_idle, case.files_after_folds, case.files_with_held]
        shown = " | ".join(f"{value / case.tib / MIB:.2f}" for value in per)
        fold = f"{case.longest_fold * 1000:.0f}"
        lines.append(f"| {case.workload} | {case.tib} | {case.idle_per_tib:.2f} | {shown} ({case.held}) | {fold} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tib", type=int, nargs="*", default=[1, 16, 64], help="sizes with scattered changes")
    parser.add_argument("--dense-tib", type=int, nargs="*", default=[1], help="sizes written all over, many times")
    parser.add_argument("--held", type=int, default=4, help="snapshots held")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="a directory on a tmpfs")
    options = parser.parse_args()
    cases = [("scattered", tib) for tib in options.tib] + [("dense", tib) for tib in options.dense_tib]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        running = [processes.submit(run_case, *case, options.held, options.directory) for case in cases]
        results = [future.result() for future in running]
    settings: dict[str, str | int | float] = {
        "numpy": np.__version__,
        "seed": SEED,
        "scattered blocks a snapshot": SCATTERED,
        "held": options.held,
    }
    document = Document(machine(), settings, results)
    store("cbt-query", document, to_markdown(document))


if __name__ == "__main__":
    main()
