# SPDX-License-Identifier: MIT
"""The program in C that lets requests go through the engine; `make` builds it from what lies here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec

PROGRAM = Path(__file__).resolve().parents[2] / "build" / "bench" / "driver"
LIMIT = 600.0
"""Seconds after which a run counts as hung."""


class Run(msgspec.Struct, frozen=True):
    """What one run of the program says: times in ns, that of the processor for all threads, counters of the queue."""

    requests: int
    ns: int
    cpu_ns: int
    p50_ns: int
    p99_ns: int
    copies: int
    copied: int
    waits: int
    rereads: int

    @property
    def per_second(self) -> float:
        """Requests per second."""
        return self.requests * 1e9 / self.ns


Options = dict[str, str | int]
"""The program's options by name: see struct options in driver.h."""


def arguments(options: Options) -> list[str]:
    """The program and its options as a command."""
    return [str(PROGRAM), *(f"{name}={value}" for name, value in options.items())]


def run(options: Options, *, under: list[str] | None = None) -> Run:
    """Runs it, `under` another program if that is given. RuntimeError with its words when it fails."""
    command = [*(under or []), *arguments(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return msgspec.json.decode(done.stdout, type=Run)
