# SPDX-License-Identifier: MIT
"""Time and memory of change tracking: "changed since" on large devices, with few and with many changes.

    .venv/bin/python bench/cbt_query.py [--tib 1 16 64] [--dense-tib 1] [--directory /dev/shm]

Prints one JSON document. Times are in seconds, the least of several repeats, memory in bytes: `files` is what the
state occupies in its tmpfs, measured in allocated blocks after all queries, so that what a query allocates by
touching it is seen; `peak_process` is the highest resident memory of the process, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.cbt import Cursor, History

TIB = 1 << 40
SCATTERED = 20_000
DENSE_RUN = 37
DENSE_TAKES = 18
REPEATS = 5
SEED = 1


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


def least(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first call and of the quickest of the others."""
    times = []
    for _ in range(1 + REPEATS):
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return round(times[0], 5), round(min(times[1:]), 5)


def resident(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def measure(
    history: History, directory: Path, changes: list[NDArray[np.int64] | None], held: int
) -> dict[str, float | int]:
    """A base folded from several snapshots, then `held` snapshots that stay."""
    idle = resident(directory)
    fold_time = 0.0
    for blocks in changes:
        number = take(history, blocks)
        history.destroy(number)
        before = time.perf_counter()
        history.fold()
        fold_time = max(fold_time, time.perf_counter() - before)
    after_fold = resident(directory)
    base = history.number
    for _ in range(held):
        take(history, changes[-1])
    history.fold()
    cursor = Cursor(history.generation, base)
    first, since_all = least(lambda: history.changes(None))
    _, since_base = least(lambda: history.changes(cursor))
    _, since_last = least(lambda: history.changes(Cursor(history.generation, history.number - 1)))
    answer = history.changes(None)
    return {
        "files_idle": idle,
        "files_after_folds": after_fold,
        "files_with_held": resident(directory),
        "held": held,
        "longest_fold": round(fold_time, 4),
        "query_since_none_first": first,
        "query_since_none": since_all,
        "query_since_base": since_base,
        "query_since_last": since_last,
        "ranges": len(answer.ranges),
        "changed_bytes": answer.changed_bytes,
    }


def scattered(history: History, chance: np.random.Generator) -> list[NDArray[np.int64] | None]:
    return [chance.integers(0, history.blocks, SCATTERED) for _ in range(4)]


def dense(history: History, chance: np.random.Generator) -> list[NDArray[np.int64] | None]:
    """Everything written again and again, then pieces of it: the array is as large as it can be."""
    pieces = [np.arange(0, history.blocks, DENSE_RUN, dtype=np.int64) + shift for shift in range(3)]
    return [*[None] * DENSE_TAKES, *(piece[piece < history.blocks] for piece in pieces)]


WORKLOADS = {"scattered": scattered, "dense": dense}


def run_case(workload: str, tib: int, held: int, parent: Path) -> dict[str, object]:
    """One case, in a process of its own so that its memory is its own."""
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        directory = Path(temporary)
        history = History.create(directory, tib * TIB)
        changes = WORKLOADS[workload](history, np.random.default_rng(SEED))
        figures = measure(history, directory, changes, held)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"workload": workload, "tib": tib, "blocks": history.blocks, **figures, "peak_process": peak}


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
    machine = {"machine": platform.machine(), "kernel": platform.release(), "cpus": os.cpu_count()}
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    document = {**machine, **versions, "seed": SEED, "scattered_blocks": SCATTERED, "results": results}
    json.dump(document, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
