# SPDX-License-Identifier: MIT
"""Snapshots on the local transport: real threads, real files, io_uring."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus, Op
from tests.unit.engine.disks import TRACKING_BLOCK, UNIT, Arena, Filtered, Snapshot, memory, read_all, storage

SIZE = 8 << 20


class Writers:
    """Threads that write version after version to blocks of their own, and know which ones had ended at a moment."""

    def __init__(self, disk: Filtered, count: int, seed: int) -> None:
        self._disk = disk
        self._stop = threading.Event()
        self.blocks = disk.size // UNIT
        self.submitted = [0] * self.blocks
        self.completed = [0] * self.blocks
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._write, args=(n, count, seed + n)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _write(self, number: int, count: int, seed: int) -> None:
        dice = random.Random(seed)
        mine = range(number, self.blocks // 16, count)  # in a part of the disk, so that blocks are written again
        buffer = memory(16 * UNIT)
        try:
            while not self._stop.is_set():
                first = 16 * dice.choice(mine)
                length = dice.randrange(1, 17)
                for block in range(first, first + length):
                    self.submitted[block] += 1
                    stamp = self.submitted[block].to_bytes(4, "little") + block.to_bytes(4, "little")
                    buffer[(block - first) * UNIT : (block - first + 1) * UNIT] = stamp * (UNIT // 8)
                self._disk.queues[dice.randrange(len(self._disk.queues))].write(
                    first * UNIT, memoryview(buffer)[: length * UNIT]
                )
                for block in range(first, first + length):
                    self.completed[block] += 1
        except OSError as error:
            self.failures.append(str(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not self.failures


def versions(content: bytes) -> list[int]:
    """The version that each block holds; a block whose words differ is torn."""
    found = []
    for block in range(len(content) // UNIT):
        unit = content[block * UNIT : (block + 1) * UNIT]
        assert unit == unit[:8] * (UNIT // 8), f"block {block} is torn"
        assert int.from_bytes(unit[4:8], "little") == block, f"block {block} holds another one"
        found.append(int.from_bytes(unit[:4], "little"))
    return found


def watch_an_image(
    disk: Filtered, store: engine.Storage, arena: Arena, reader: engine.Thread, writers: Writers
) -> None:
    """Takes a snapshot while writers run and reads it again and again."""
    snapshot = Snapshot([disk], store, arena)
    before = list(writers.completed)
    with snapshot:
        after = list(writers.submitted)
        with engine.LocalQueue(reader, image=snapshot.images[0]) as view:
            contents = []
            for _ in range(4):
                contents.append(read_all(view, SIZE))
                time.sleep(0.05)
        assert all(content == contents[0] for content in contents)
        for block, version in enumerate(versions(contents[0])):
            assert before[block] <= version <= after[block], f"block {block}"
        assert snapshot.images[0].status == (ImageStatus.ACTIVE, 0)
        assert 0 < snapshot.images[0].preserved <= store.used


@pytest.mark.parametrize("zero_copy", [True, False])
def test_an_image_is_the_instant_it_was_taken(folder: Path, zero_copy: bool) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    with (
        engine.Thread() as one,
        engine.Thread() as two,
        engine.Thread() as reader,
        Filtered(folder, "origin", SIZE, [one, two], zero_copy=zero_copy) as disk,
        Arena() as arena,
    ):
        zero = memory(UNIT)
        for block in range(SIZE // UNIT):
            zero[:] = (bytes(4) + block.to_bytes(4, "little")) * (UNIT // 8)
            disk.queue.write(block * UNIT, zero)
        with Writers(disk, 6, seed) as writers:
            for _ in range(3):
                time.sleep(0.05)
                with storage(folder, 5 << 20, 4 << 20) as store:
                    watch_an_image(disk, store, arena, reader, writers)
        assert versions(read_all(disk.queue, SIZE)) == writers.completed


def test_two_devices_have_one_instant(folder: Path) -> None:
    """B is written after A has completed: no pair of images holds a B that is ahead of A."""
    with (
        engine.Thread() as one,
        engine.Thread() as two,
        engine.Thread() as reader,
        Filtered(folder, "a", SIZE, [one]) as a,
        Filtered(folder, "bb", SIZE, [two]) as b,
        Arena() as arena,
    ):
        stop = threading.Event()
        counter = [0]
        for disk in (a, b):
            disk.queue.write(0, memory(UNIT))

        def count() -> None:
            buffer = memory(UNIT)
            while not stop.is_set():
                counter[0] += 1
                buffer[:] = counter[0].to_bytes(8, "little") * (UNIT // 8)
                a.queue.write(0, buffer)
                b.queue.write(0, buffer)

        writer = threading.Thread(target=count)
        writer.start()
        pairs = []
        with storage(folder, 1 << 20) as store:
            for _ in range(30):
                with Snapshot([a, b], store, arena) as snapshot:
                    values = []
                    for image in snapshot.images:
                        with engine.LocalQueue(reader, image=image, depth=4) as view:
                            values.append(int.from_bytes(read_all(view, UNIT)[:8], "little"))
                    pairs.append((values[0], values[1]))
        stop.set()
        writer.join(10)
        assert counter[0] > 0
        assert all(first - second in (0, 1) for first, second in pairs), pairs


def test_a_full_storage_breaks_the_image_and_never_the_origin(folder: Path, thread: engine.Thread) -> None:
    with (
        Filtered(folder, "origin", SIZE, [thread]) as disk,
        Arena() as arena,
        storage(folder, 64 << 10) as store,
        Snapshot([disk], store, arena) as snapshot,
    ):
        [image] = snapshot.images
        with engine.LocalQueue(thread, image=image) as view:
            before = read_all(view, UNIT)
            data = memory(SIZE)
            data[:] = b"\x77" * SIZE
            for start in range(0, SIZE, 1 << 20):
                disk.queue.write(start, memoryview(data)[start : start + (1 << 20)])
            assert image.status == (ImageStatus.OVERFLOWN, errno.ENOSPC)
            for start in (0, SIZE - UNIT):
                with pytest.raises(OSError, match="READ") as caught:
                    view.read(start, memory(UNIT))
                assert caught.value.errno == errno.EIO
            assert before != read_all(disk.queue, UNIT)
        assert read_all(disk.queue, SIZE) == data[:]


def test_storage_that_fails_breaks_the_image_and_never_the_origin(folder: Path, thread: engine.Thread) -> None:
    """The storage file is cut short behind the engine's back and cannot grow again: a descriptor for reading only."""
    path = folder / "storage"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    with (
        Filtered(folder, "origin", SIZE, [thread]) as disk,
        Arena() as arena,
        engine.File(fd, storage=True) as file,
        engine.Storage(memory(engine.STORAGE_STATE_BYTES), unit=UNIT) as store,
    ):
        store.add_area(file, 0, 1 << 20, memory(store.records_bytes(1 << 20)))
        with Snapshot([disk], store, arena) as snapshot:
            disk.queue.write(0, memory(UNIT))
            assert snapshot.images[0].status == (ImageStatus.CORRUPTED, errno.EBADF)
            assert read_all(disk.queue, UNIT) == bytes(UNIT)
    os.close(fd)


def test_what_changed_is_marked_in_the_interval_it_changed_in(folder: Path, thread: engine.Thread) -> None:
    with Filtered(folder, "origin", SIZE, [thread]) as disk, Arena() as arena, storage(folder, 1 << 20) as store:
        disk.queue.write(TRACKING_BLOCK * 3 - 512, memory(1024))
        first = disk.bitmap
        with Snapshot([disk], store, arena):
            assert disk.bitmap is not first
            assert disk.marked() == set()
            disk.queue.write_zeroes(TRACKING_BLOCK * 9, 512)
            disk.device.mark(TRACKING_BLOCK * 20, 1)
            assert disk.marked() == {9, 20}
        assert {block for block in range(disk.blocks) if first[block // 8] >> (block % 8) & 1} == {2, 3}
        assert disk.marked() == {9, 20}


def test_swallowed_trims_are_sent_when_the_last_image_went(folder: Path, thread: engine.Thread) -> None:
    with Filtered(folder, "origin", SIZE, [thread]) as disk, Arena() as arena, storage(folder, 1 << 20) as store:
        full = disk.path.stat().st_blocks
        with Snapshot([disk], store, arena):
            disk.queue.discard(1 << 20, 4 << 20)
            assert disk.path.stat().st_blocks == full
            disk.queue.write(2 << 20, memory(65536))
        turns = 1
        while engine.replay_swallowed(thread, disk.device, disk.file, slice_bytes=1 << 20):
            turns += 1
            disk.queue.write(0, memory(UNIT))
        assert turns >= 4
        assert disk.path.stat().st_blocks == full - ((4 << 20) - 65536) // 512
        assert not engine.replay_swallowed(thread, disk.device, disk.file)


def test_a_write_that_does_not_end_makes_a_take_late_and_nothing_else(folder: Path, thread: engine.Thread) -> None:
    # without map memory a write waits for some, for a few seconds
    other = folder / "other"
    other.mkdir()
    with (
        Filtered(folder, "a", SIZE, [thread]) as a,
        Filtered(folder, "bb", SIZE, [thread]) as b,
        Arena() as arena,
        Arena(0) as nothing,
        storage(folder, 1 << 20) as store,
        storage(other, 1 << 20) as own,
        Snapshot([b], own, nothing) as stuck,
    ):
        tag = b.queue.submit(Op.WRITE, 0, UNIT, memory(UNIT))
        with pytest.raises(TimeoutError):
            b.queue.wait(tag, timeout_ms=50)
        snapshot = Snapshot([a, b], store, arena)
        with pytest.raises(engine.Late) as caught:
            snapshot.take(limit_ms=100)
        assert caught.value.index == 1
        snapshot.drop()
        # all gates are open again
        a.queue.write(0, memory(UNIT))
        nothing.add(memory(engine.ARENA_PORTION))
        assert b.queue.wait(tag) == UNIT
        assert stuck.images[0].status == (ImageStatus.ACTIVE, 0)
        with Snapshot([a, b], store, arena):
            pass


def test_switch_tells_what_it_did(folder: Path, thread: engine.Thread) -> None:
    with Filtered(folder, "origin", SIZE, [thread]) as disk, Arena() as arena, storage(folder, 1 << 20) as store:
        commit = memory(4096)
        snapshot = Snapshot([disk], store, arena)
        disk.device.prepare_take(snapshot.images[0])
        gate = engine.switch_all([disk.device], [disk.new_bitmap()], commit=commit)
        engine.settle(disk.device)
        assert gate.ns > 0
        assert gate.writes_ns == 0, "nothing was in flight"
        assert int.from_bytes(commit[:4], "little") == 1
        snapshot.taken = True
        snapshot.drop()
        with pytest.raises(ValueError, match="bitmaps"):
            engine.switch_all([disk.device], [])
        with pytest.raises(OSError, match="switch"):
            engine.switch_all([], [])
