# SPDX-License-Identifier: MIT
"""Writers that count: n goes to the first device, and when that write has completed to the next. No image may show the
second device ahead of the first, nor the first more than one ahead of the second."""

from __future__ import annotations

import mmap
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.direct_io import read_at
from tests.own_daemon import PATIENCE, wait_until

BLOCK = 4096
PLACES = 8
"""Blocks of one writer on each device, written in turn: a new snapshot is followed by first overwrites."""

_SCRIPT = f"""
import mmap, os, sys
record = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
words = memoryview(record).cast("Q")
writer = int(sys.argv[2])
devices = [os.open(path, os.O_WRONLY | os.O_DIRECT) for path in sys.argv[3:]]
page = mmap.mmap(-1, {BLOCK})
n = 0
while not words[0]:
    n += 1
    page[:] = n.to_bytes(8, "little") * {BLOCK // 8}
    start = (writer * {PLACES} + n % {PLACES}) * {BLOCK}
    words[1 + 2 * writer] = n
    for device in devices:
        if os.pwritev(device, [page], start) != {BLOCK}:
            sys.exit("a short write")
    words[2 + 2 * writer] = n
"""


class CountingWriters:
    """`count` processes that write inside of its `with`, to the same blocks at the beginning of each device.

    A write that fails, fails the `with`.
    """

    def __init__(self, devices: Sequence[str], count: int, folder: Path) -> None:
        """`devices` in the order in which a number reaches them; `folder` is for a file of the writers' own."""
        self.count = count
        self._devices = list(devices)
        self._record = folder / "numbers"
        self._processes: list[subprocess.Popen[str]] = []

    def started(self) -> list[int]:
        """For each writer the highest number that may have been submitted."""
        return [self._word(1 + 2 * writer) for writer in range(self.count)]

    def ended(self) -> list[int]:
        """For each writer the highest number that every device has completed."""
        return [self._word(2 + 2 * writer) for writer in range(self.count)]

    def check(self) -> None:
        """Fails if a writer has ended."""
        for process in self._processes:
            assert process.poll() is None, process.communicate()[1]

    def __enter__(self) -> Self:
        self._record.write_bytes(bytes(mmap.PAGESIZE))
        with self._record.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        try:
            for writer in range(self.count):
                command = [sys.executable, "-S", "-c", _SCRIPT, str(self._record), str(writer), *self._devices]
                self._processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            # From then on every block of theirs holds a number.
            wait_until("every writer has been round", lambda: self.check() is None and min(self.ended()) > PLACES)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        struct.pack_into("<Q", self._memory, 0, 1)
        try:
            for process in self._processes:
                said = process.communicate(timeout=PATIENCE)[1]
                assert error is not None or process.returncode == 0, said
        finally:
            self._kill()
            self._memory.close()
            self._record.unlink()

    def _word(self, index: int) -> int:
        return int(struct.unpack_from("<Q", self._memory, 8 * index)[0])

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def numbers(path: str, writers: int) -> list[int]:
    """The last number of each writer that a device or an image holds. Fails if it does not hold those before it too."""
    found = []
    content = read_at(path, 0, writers * PLACES * BLOCK)
    for writer in range(writers):
        held = []
        for place in range(PLACES):
            start = (writer * PLACES + place) * BLOCK
            block = content[start : start + BLOCK]
            assert block == block[:8] * (BLOCK // 8), f"{path}: the block at {start} is of two writes"
            held.append(struct.unpack_from("<Q", block)[0])
        last = max(held)
        expected = {number % PLACES: number for number in range(last - PLACES + 1, last + 1)}
        assert held == [expected[place] for place in range(PLACES)], f"{path}: writer {writer}: {held}"
        found.append(last)
    return found


def expect_one_instant(images: Sequence[Sequence[int]], ended_before: Sequence[int], started_by: Sequence[int]) -> None:
    """`images`: of each device in order what `numbers` found, `ended_before` the take, `started_by` its return."""
    for writer, (least, most) in enumerate(zip(ended_before, started_by, strict=True)):
        held = [image[writer] for image in images]
        text = f"writer {writer}: images hold {held}, ended before the take {least}, started by its end {most}"
        assert held == sorted(held, reverse=True), f"a later device is ahead: {text}"
        assert held[0] - held[-1] <= 1, f"a number began before the one before it had ended everywhere: {text}"
        assert least <= held[-1], f"a write that had ended is missing: {text}"
        assert held[0] <= most, f"a write is there that came after: {text}"
