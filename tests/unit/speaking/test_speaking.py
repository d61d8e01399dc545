# SPDX-License-Identifier: MIT
"""Two devices with real threads, written to all the time: each snapshot shows one instant of both, and goes on to."""

from __future__ import annotations

import itertools
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import Flags, Op
from tests.speaking.checker import Instant, complaints, now
from tests.speaking.sectors import SECTOR
from tests.speaking.writers import Write, Writer, Writers
from tests.unit.engine.disks import Arena, Filtered, memory, read_all, storage

SIZE = 1 << 20
WRITERS = 5
TAKES = 12
HELD = 3
NOISE_AT_ONCE = 16
NOISE_BYTES = 1 << 20
SOAK_SECONDS = int(os.environ.get("BSU_SOAK_SECONDS", "0"))


class Taken:
    """A snapshot of all disks. Its images are read as soon as it is taken, before anything has settled.

    First where writes were in flight: one that the take did not wait for could still land in an image.
    """

    def __init__(
        self,
        disks: Sequence[Filtered],
        store: engine.Storage,
        arena: engine.Arena,
        thread: engine.Thread,
        serial: int,
        writers: Sequence[Writer],
    ) -> None:
        self._disks = disks
        states = [memory(engine.Image.state_bytes(disk.size)) for disk in disks]
        self._images = [
            engine.Image(disk.device, store, arena, state, serial=serial + index)
            for index, (disk, state) in enumerate(zip(disks, states, strict=True))
        ]
        bitmaps = [disk.new_bitmap() for disk in disks]
        for disk, image in zip(disks, self._images, strict=True):
            disk.device.prepare_take(image)
        self._queues = [engine.LocalQueue(thread, image=image) for image in self._images]
        began = time.monotonic_ns()
        engine.switch_all([disk.device for disk in disks], bitmaps, limit_ms=30_000)
        self.instant = Instant(began, time.monotonic_ns())
        self._early = [(last, self._read_part(last)) for last in (writer.written[-1] for writer in writers)]
        self.first_seen = self.read()
        for disk, bitmap in zip(disks, bitmaps, strict=True):
            engine.settle(disk.device)
            disk.bitmap = bitmap

    def read(self) -> list[bytes]:
        """What all images show."""
        return [read_all(queue, disk.size) for queue, disk in zip(self._queues, self._disks, strict=True)]

    def _read_part(self, where: Write) -> bytes:
        part = memory(where.count * SECTOR)
        view = memoryview(part)[: where.count * SECTOR]
        self._queues[where.device].read(where.first * SECTOR, view)
        return bytes(view)

    def expect_one_instant(self, writers: Sequence[Writer]) -> None:
        for last, content in self._early:
            start = last.first * SECTOR
            assert content == self.first_seen[last.device][start : start + len(content)], (
                f"{last} has landed in an image"
            )
        wrong = complaints(self.instant, self.first_seen, writers)
        assert not wrong, wrong[:10]
        self.expect_the_same()

    def expect_the_same(self) -> None:
        for device, (first, again) in enumerate(zip(self.first_seen, self.read(), strict=True)):
            changed = [at for at in range(0, len(first), SECTOR) if first[at : at + SECTOR] != again[at : at + SECTOR]]
            assert not changed, f"image of device {device} has changed at {changed[:10]}"

    def drop(self) -> None:
        for queue in self._queues:
            queue.finish()
        for disk, image in zip(self._disks, self._images, strict=True):
            disk.device.prepare_drop(image)
        devices = [disk.device for disk in self._disks]
        engine.switch_all(devices, [None] * len(devices), limit_ms=30_000)
        for disk, image in zip(self._disks, self._images, strict=True):
            engine.settle(disk.device)
            image.close()


@pytest.fixture(autouse=True)
def quick_changes_of_threads() -> Iterator[None]:
    """Whoever takes a snapshot looks at it at once, instead of some milliseconds later."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def drop_all(held: Iterable[Taken]) -> None:
    for taken in held:
        taken.drop()


@contextmanager
def two_disks(folder: Path, threads: Sequence[engine.Thread], zero_copy: bool) -> Iterator[list[Filtered]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(Filtered(folder, name, SIZE, threads, zero_copy=zero_copy)) for name in ("one", "two")
        ]


@contextmanager
def noise(folder: Path, threads: Sequence[engine.Thread]) -> Iterator[None]:
    """Large writes to the same disk of the machine, so that those of others take longer and are in flight at a take."""
    with Filtered(folder, "noise", NOISE_AT_ONCE * NOISE_BYTES, threads) as disk:
        stop = threading.Event()
        data = memory(NOISE_BYTES)

        def run() -> None:
            tags: deque[tuple[engine.LocalQueue, int]] = deque()
            for number in itertools.count():
                if len(tags) == NOISE_AT_ONCE or (tags and stop.is_set()):
                    queue, tag = tags.popleft()
                    queue.wait(tag)
                elif stop.is_set():
                    return
                else:
                    queue = disk.queues[number % len(disk.queues)]
                    tags.append(
                        (queue, queue.submit(Op.WRITE, number % NOISE_AT_ONCE * NOISE_BYTES, NOISE_BYTES, data))
                    )

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("zero_copy", [True, False], ids=["zero-copy", "copy"])
def test_every_snapshot_shows_one_instant(folder: Path, zero_copy: bool) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    with ExitStack() as stack:
        threads = [stack.enter_context(engine.Thread()) for _ in range(2)]
        disks = stack.enter_context(two_disks(folder, threads, zero_copy))
        store = stack.enter_context(storage(folder, 64 << 20))
        arena = stack.enter_context(Arena())

        def write(device: int, start: int, data: memoryview) -> None:
            disk = disks[device]
            flags = Flags.FUA if start // SECTOR % 3 == 0 else Flags.NONE
            disk.queues[start // SECTOR % len(disk.queues)].write(start, data, flags)

        writers = Writers(WRITERS, [SIZE // SECTOR] * 2, write, seed)
        held: deque[Taken] = deque()
        stack.callback(drop_all, held)
        end = time.monotonic() + SOAK_SECONDS / 2
        take = 0
        with noise(folder, threads), writers:
            while take < TAKES or time.monotonic() < end:
                held.append(Taken(disks, store, arena, threads[take % 2], 1 + take * 2, writers.writers))
                take += 1
                held[-1].expect_one_instant(writers.writers)
                if len(held) > HELD:
                    held[0].expect_the_same()
                    held.popleft().drop()
        print(f"{take} snapshots, {writers.count} writes")
        for taken in held:
            taken.expect_the_same()
        wrong = complaints(now(), [read_all(disk.queue, SIZE) for disk in disks], writers.writers)
        assert not wrong, wrong[:10]
