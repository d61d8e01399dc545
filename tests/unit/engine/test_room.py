# SPDX-License-Identifier: MIT
"""Storage that is short of room under load: areas are added, snapshots evicted, rates and limits changed meanwhile."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from tests.unit.engine.disks import UNIT, Arena, Filtered, Snapshot, make_file, memory, read_all

SIZE = 2 << 20
AREA = 16 * UNIT
MINUTE_MS = 60_000
ROUNDS = 12
PATIENCE = 60.0


class Store:
    """A storage that begins with nothing; `grow` adds an area of one file."""

    def __init__(self, stack: ExitStack, folder: Path, size: int) -> None:
        self.size = size
        self.given = 0
        self.file = make_file(folder / "storage", size, storage=True)
        stack.callback(self.file.close)
        self.state = memory(engine.STORAGE_STATE_BYTES)
        self.storage = stack.enter_context(engine.Storage(self.state, unit=UNIT))

    def grow(self, length: int = AREA) -> bool:
        """False when the file is used up."""
        length = min(length, self.size - self.given)
        if length:
            self.storage.add_area(self.file, self.given, length, memory(self.storage.records_bytes(length)))
            self.given += length
        return length > 0

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return int(np.frombuffer(self.state, np.uint32)[11])


class Writers:
    """Threads that write anywhere, one for each queue, until `stop`. `pause`: none of them is inside of a write."""

    def __init__(self, disk: Filtered, seed: int) -> None:
        self._disk = disk
        self._go = threading.Event()
        self._stop = False
        self._errors: list[BaseException] = []
        self._still = [threading.Event() for _ in disk.queues]
        self.writes = 0
        self._threads = [
            threading.Thread(target=self._write, args=(queue, random.Random(seed + number), self._still[number]))
            for number, queue in enumerate(disk.queues)
        ]
        for thread in self._threads:
            thread.start()

    def _write(self, queue: engine.LocalQueue, die: random.Random, still: threading.Event) -> None:
        try:
            while not self._stop:
                if not self._go.is_set():
                    still.set()
                    self._go.wait()
                    still.clear()
                    continue
                length = die.choice((512, UNIT, UNIT, 3 * UNIT, 20 * UNIT))
                start = die.randrange((SIZE - length) // 512) * 512
                queue.write(start, die.randbytes(length))
                self.writes += 1
        except BaseException as error:
            self._errors.append(error)
        finally:
            still.set()

    def pause(self, meanwhile: Callable[[], None]) -> None:
        """Until all of them are still; `meanwhile` is done again and again."""
        self._go.clear()
        wait_until(lambda: all(still.is_set() for still in self._still), meanwhile)

    def go_on(self) -> None:
        """They write again."""
        for still in self._still:
            still.clear()
        self._go.set()

    def stop(self, meanwhile: Callable[[], None]) -> None:
        """They end; raises what went wrong in them."""
        self._stop = True
        self._go.set()
        wait_until(lambda: not any(thread.is_alive() for thread in self._threads), meanwhile)
        for error in self._errors:
            raise error


def reached(writers: Writers, writes: int) -> bool:
    """Whether so many have ended since the beginning."""
    return writers.writes >= writes


def wait_until(true: Callable[[], bool], meanwhile: Callable[[], None]) -> None:
    """AssertionError when it does not become true."""
    end = time.monotonic() + PATIENCE
    while not true():
        meanwhile()
        time.sleep(0.001)
        assert time.monotonic() < end, "it never ends"


def content(disk: Filtered) -> bytes:
    """All of the origin."""
    return read_all(disk.queues[0], SIZE)


def check(thread: engine.Thread, held: Snapshot, instant: bytes) -> bool:
    """The image is what it was, or it is broken; which."""
    image = held.images[0]
    view = engine.LocalQueue(thread, image=image, depth=8)
    try:
        for start in range(0, SIZE, AREA):
            part = memory(AREA)
            try:
                view.read(start, part)
            except OSError:
                assert image.status[0] is not ImageStatus.ACTIVE, "an image that can be trusted gives an error"
                return False
            assert part[:] == instant[start : start + AREA], f"wrong data in {start}+{AREA}"
        return image.status[0] is ImageStatus.ACTIVE
    finally:
        view.finish()


@contextmanager
def machine(folder: Path) -> Iterator[tuple[ExitStack, list[engine.Thread], Filtered, Arena]]:
    """Three threads, a device on two of them, map memory."""
    with ExitStack() as stack:
        threads = [stack.enter_context(engine.Thread()) for _ in range(3)]
        disk = stack.enter_context(Filtered(folder, "origin", SIZE, threads[:2]))
        yield stack, threads, disk, stack.enter_context(Arena())


def test_areas_are_added_while_writers_wait(folder: Path) -> None:
    """From nothing, a bit at a time: nobody notices but by waiting."""
    with machine(folder) as (stack, threads, disk, arena):
        store = Store(stack, folder, 2 * SIZE)
        store.storage.set_room(wait_ms=MINUTE_MS, low=4 * UNIT)
        instant = content(disk)
        held = stack.enter_context(Snapshot([disk], store.storage, arena))
        workers = [threading.Thread(target=overwrite, args=(queue, number)) for number, queue in enumerate(disk.queues)]
        for worker in workers:
            worker.start()
        waited = 0

        def grow() -> None:
            nonlocal waited
            if store.waiting:
                waited += 1
                assert store.grow()

        wait_until(lambda: not any(worker.is_alive() for worker in workers), grow)
        assert waited
        assert check(threads[2], held, instant)
        assert held.images[0].preserved == SIZE
        assert content(disk) != instant


def overwrite(queue: engine.LocalQueue, number: int) -> None:
    """All of the device, the same units from both sides at once."""
    for start in range(0, SIZE, 2 * UNIT):
        at = start if number else SIZE - start - 2 * UNIT
        queue.write(at, bytes([1 + number]) * (2 * UNIT))


def test_a_limited_rate_loses_nothing(folder: Path) -> None:
    """Writers of both queues wait their turn for the same storage, the rate changes under them."""
    with machine(folder) as (stack, threads, disk, arena):
        store = Store(stack, folder, 2 * SIZE)
        store.grow(2 * SIZE)
        instant = content(disk)
        held = stack.enter_context(Snapshot([disk], store.storage, arena))
        workers = [threading.Thread(target=overwrite, args=(queue, number)) for number, queue in enumerate(disk.queues)]
        die = random.Random(1)
        store.storage.set_rate(1 << 20)
        for worker in workers:
            worker.start()
        wait_until(
            lambda: not any(worker.is_alive() for worker in workers),
            lambda: store.storage.set_rate(die.choice((1 << 20, 4 << 20, 1 << 30))),
        )
        assert check(threads[2], held, instant)
        assert held.images[0].preserved == SIZE


def test_snapshots_are_evicted_while_writers_wait(folder: Path) -> None:
    """Some room comes, some snapshots go without a gate, some overflow; what is left is right."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    die = random.Random(seed)
    with machine(folder) as (stack, threads, disk, arena):
        store = Store(stack, folder, 3 * SIZE)
        store.grow()
        held: list[tuple[Snapshot, bytes]] = []

        def make_room() -> None:
            if not store.waiting:
                return
            what = die.random()
            if what < 0.4 and store.grow(die.randrange(1, 20) * UNIT):
                return
            if what < 0.9 and evict():
                return
            store.storage.set_room(wait_ms=0, low=0)
            store.storage.set_room(wait_ms=die.choice((5, MINUTE_MS)), low=die.choice((0, 8 * UNIT)))

        def evict() -> bool:
            for number, (snapshot, _) in enumerate(held[:-1]):
                disk.device.prepare_drop(snapshot.images[0])
                if disk.device.begin_drop():
                    # Only broken ones are younger: the gate is for the last step of the test.
                    disk.device.cancel()
                    store.storage.set_room(wait_ms=0, low=0)
                    disk.device.prepare_drop(snapshot.images[0])
                    disk.device.begin_drop()
                    engine.switch_all([disk.device], [None], limit_ms=20_000)
                else:
                    disk.device.drop_now()
                engine.settle(disk.device)
                snapshot.taken = False
                snapshot.drop()
                del held[number]
                return True
            return False

        writers = Writers(disk, seed)
        try:
            for _ in range(ROUNDS):
                store.storage.set_room(wait_ms=MINUTE_MS, low=8 * UNIT)
                store.storage.set_rate(die.choice((0, 0, 8 << 20, 64 << 20)))
                writers.pause(make_room)
                snapshot = Snapshot([disk], store.storage, arena)
                snapshot.take()
                held.append((snapshot, content(disk)))
                writers.go_on()
                enough = writers.writes + 60
                wait_until(functools.partial(reached, writers, enough), make_room)
                store.storage.set_room(wait_ms=0, low=0)
                check(threads[2], *die.choice(held))
        finally:
            store.storage.set_rate(0)
            store.storage.set_room(wait_ms=0, low=0)
            writers.stop(lambda: None)
        for snapshot, instant in held:
            check(threads[2], snapshot, instant)
        while held:
            held.pop(die.randrange(len(held)))[0].drop()
        assert not store.storage.used
        assert arena.free == arena.total
