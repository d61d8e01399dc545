# SPDX-License-Identifier: MIT
"""Threads that write speaking sectors to several devices, and remember when each write was submitted and completed."""

from __future__ import annotations

import mmap
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.speaking.sectors import SECTOR, Spoken, speaking

MOST_SECTORS = 64
JOIN_SECONDS = 300.0

WriteTo = Callable[[int, int, memoryview], object]
"""`write(device, start, data)`: start in bytes; returns when the write has completed, raises OSError when it failed."""


@dataclass
class Write:
    """A write to `count` sectors. `submitted` was read before, `completed` after it; None while it is in flight."""

    device: int
    first: int
    count: int
    submitted: int
    completed: int | None = None


class Writer:
    """One thread: its write n is submitted when write n - 1 has completed, most often to another device.

    `written[n]` is its write with the sequence n.
    """

    def __init__(self, number: int, sectors: Sequence[int], write: WriteTo, seed: int) -> None:
        self.number = number
        self.written: list[Write] = []
        self.failure: BaseException | None = None
        self._sectors = sectors
        self._write = write
        self._dice = random.Random(seed)
        self._buffer = mmap.mmap(-1, MOST_SECTORS * SECTOR)

    def write(self, device: int, first: int, count: int) -> Write:
        """One write of at most MOST_SECTORS sectors."""
        before = self.written[-1].completed if self.written else 0
        assert before is not None
        submitted = time.monotonic_ns()
        said = Spoken(self.number, len(self.written), submitted, before)
        self._buffer[: count * SECTOR] = speaking(device, first, count, said)
        made = Write(device, first, count, submitted)
        self.written.append(made)
        self._write(device, first * SECTOR, memoryview(self._buffer)[: count * SECTOR])
        made.completed = time.monotonic_ns()
        return made

    def write_anywhere(self) -> None:
        """One write to a device and a place that the dice choose; writers overlap one another."""
        device = self._dice.randrange(len(self._sectors))
        count = self._dice.choice([1, 1, 2, 7, 8, 8, 16, 33, MOST_SECTORS])
        self.write(device, self._dice.randrange(self._sectors[device] - count + 1), count)

    def write_all(self) -> None:
        """Every sector of every device once, so that from then on no sector is silent."""
        for device, sectors in enumerate(self._sectors):
            for first in range(0, sectors, MOST_SECTORS):
                self.write(device, first, min(MOST_SECTORS, sectors - first))


class Writers:
    """A number of writers, writing inside of its `with`; number 0 has written every sector before. `seed` repeats them.

    A failed write fails the `with`.
    """

    def __init__(self, count: int, sectors: Sequence[int], write: WriteTo, seed: int) -> None:
        """`sectors`: of each device."""
        self.writers = [Writer(number, sectors, write, seed + number) for number in range(count)]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(writer,)) for writer in self.writers]

    def _run(self, writer: Writer) -> None:
        try:
            while not self._stop.is_set():
                writer.write_anywhere()
        except BaseException as error:
            writer.failure = error

    @property
    def count(self) -> int:
        """Writes so far."""
        return sum(len(writer.written) for writer in self.writers)

    def __enter__(self) -> Self:
        self.writers[0].write_all()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
            assert not thread.is_alive(), "a write does not end"
        if error is None:
            failures = [writer.failure for writer in self.writers if writer.failure is not None]
            assert not failures, failures
