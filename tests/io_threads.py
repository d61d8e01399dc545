# SPDX-License-Identifier: MIT
"""The queue threads of an io process: their page faults, and, with a library preloaded, their calls for memory."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("counted_calls.c")
THREADS = 1 << 16
"""Of how many threads the calls are counted, by their number modulo this."""


@dataclass(frozen=True)
class Faults:
    """Page faults of a thread since it was started."""

    without_io: int
    with_io: int


def faults(pid: int) -> dict[int, Faults]:
    """Of each queue thread of process `pid`, by its number."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith("bsu-q"):
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            found[int(task.name)] = Faults(int(fields[7]), int(fields[9]))
    return found


def missing_for_counted_calls() -> str | None:
    """Why `counted_calls` cannot be used here, or None."""
    return None if shutil.which("cc") else "no C compiler"


@dataclass
class CountedCalls:
    """Calls for memory, by thread; `environment` is what a process is to be started with."""

    environment: dict[str, str]
    _counts: mmap.mmap

    def of(self, threads: Iterable[int]) -> dict[int, int]:
        """Of each of these threads."""
        return {tid: struct.unpack_from("=I", self._counts, tid % THREADS * 4)[0] for tid in threads}

    def all(self) -> int:
        """Of all threads."""
        return sum(value for (value,) in struct.iter_unpack("=I", self._counts[:]))


@contextmanager
def counted_calls(folder: Path) -> Iterator[CountedCalls]:
    """Counts them in all processes that are started with its environment. `folder` is for its files."""
    library, counts = folder / "counted_calls.so", folder / "counts"
    command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    counts.write_bytes(bytes(THREADS * 4))
    descriptor = os.open(counts, os.O_RDWR)
    try:
        with mmap.mmap(descriptor, THREADS * 4) as seen:
            yield CountedCalls({"LD_PRELOAD": str(library), "BLKSNAP_COUNTS": str(counts)}, seen)
    finally:
        os.close(descriptor)
