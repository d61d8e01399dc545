# SPDX-License-Identifier: MIT
"""Images that are written to, and several of one device, on the local transport: threads, files, io_uring."""

from __future__ import annotations

import errno
import random
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from tests.unit.engine.disks import TRACKING_BLOCK, UNIT, Arena, Filtered, Snapshot, errno_of, memory, read_all, storage

SIZE = 4 << 20
SECTOR = 512


def noise(die: random.Random, length: int) -> bytes:
    return die.randbytes(length)


def marked(bitmap: object, blocks: int) -> set[int]:
    data = memoryview(bitmap)  # type: ignore[arg-type]
    return {block for block in range(blocks) if data[block // 8] >> (block % 8) & 1}


def scribble(die: random.Random, view: engine.LocalQueue, model: bytearray, times: int) -> None:
    """Writes and zeroes of any alignment, and reads of what is there in between."""
    for _ in range(times):
        start = die.randrange(len(model) // SECTOR) * SECTOR
        length = min(die.choice((1, 1, 3, 8, 9, 40, 600)) * SECTOR, len(model) - start)
        what = die.random()
        if what < 0.5:
            data = noise(die, length)
            view.write(start, data)
            model[start : start + length] = data
        elif what < 0.65:
            view.write_zeroes(start, length)
            model[start : start + length] = bytes(length)
        else:
            into = memory(length)
            view.read(start, memoryview(into)[:length])  # a page is the least, and may reach beyond the end
            assert into[:length] == model[start : start + length], f"{start}+{length}"


@pytest.mark.parametrize("zero_copy", [True, False])
def test_writes_to_images_stay_in_them(folder: Path, zero_copy: bool) -> None:
    """Three images, two of them of one instant, and the origin: each has what was written to it, and nothing else."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    die = random.Random(seed)
    with ExitStack() as stack:
        one, two, reader = (stack.enter_context(engine.Thread()) for _ in range(3))
        disk = stack.enter_context(Filtered(folder, "origin", SIZE, [one, two], zero_copy=zero_copy))
        arena = stack.enter_context(Arena())
        store = stack.enter_context(storage(folder, 6 * SIZE, 6 * SIZE))
        models = []
        views = []
        for number in range(3):
            if number == 2:
                disk.queue.write(0, noise(die, SIZE // 2))
            snapshot = Snapshot([disk], store, arena)
            models.append(bytearray(read_all(disk.queue, SIZE)))
            stack.enter_context(snapshot)
            views.append(
                stack.enter_context(engine.LocalQueue(reader, image=snapshot.images[0], zero_copy=zero_copy, depth=16))
            )
        origin = bytearray(models[-1])
        stop = threading.Event()

        def overwrite() -> None:
            other = random.Random(seed + 1)
            while not stop.is_set():
                start = other.randrange(SIZE // SECTOR - 64) * SECTOR
                data = noise(other, 64 * SECTOR)
                disk.queues[1].write(start, data)
                origin[start : start + len(data)] = data

        writer = threading.Thread(target=overwrite)
        writer.start()
        try:
            for _ in range(20):
                for view, model in zip(views, models, strict=True):
                    scribble(die, view, model, 10)
        finally:
            stop.set()
            writer.join()
        for view, model in zip(views, models, strict=True):
            assert read_all(view, SIZE) == model
        assert read_all(disk.queue, SIZE) == origin


def test_what_is_written_to_an_image_is_changed_before_and_after_it(folder: Path) -> None:
    with (
        engine.Thread() as thread,
        Filtered(folder, "origin", SIZE, [thread]) as disk,
        Arena() as arena,
        storage(folder, SIZE) as store,
        Snapshot([disk], store, arena),
    ):
        before = disk.bitmap
        with Snapshot([disk], store, arena) as snapshot:
            after = disk.bitmap
            with (
                Snapshot([disk], store, arena),
                engine.LocalQueue(thread, image=snapshot.images[0]) as view,
            ):
                view.write(TRACKING_BLOCK - SECTOR, noise(random.Random(1), 2 * SECTOR))
                view.write_zeroes(5 * TRACKING_BLOCK, UNIT)
                for bitmap in (before, after):
                    assert marked(bitmap, disk.blocks) == {0, 1, 5}
                assert disk.marked() == set()
                assert snapshot.images[0].written == 3 * UNIT


def test_image_writes_leave_room_for_copies(folder: Path) -> None:
    """They get ENOSPC while copies still find places; the image stays right."""
    with (
        engine.Thread() as thread,
        Filtered(folder, "origin", SIZE, [thread]) as disk,
        Arena() as arena,
        storage(folder, 64 * UNIT) as store,
    ):
        was = read_all(disk.queue, SIZE)
        with Snapshot([disk], store, arena) as snapshot:
            image = snapshot.images[0]
            with engine.LocalQueue(thread, image=image) as view:
                data = noise(random.Random(2), 40 * UNIT)
                view.write(0, data)
                assert errno_of(lambda: view.write(SIZE // 2, data)) == errno.ENOSPC
                assert store.capacity - store.used == 8 * UNIT
                disk.queue.write(SIZE // 2, noise(random.Random(3), 8 * UNIT))
                assert image.status == (ImageStatus.ACTIVE, 0)
                kept = bytearray(read_all(view, SIZE))
                assert kept[: 40 * UNIT] == data
                # what of the refused write was stored is there, the rest is not
                assert kept[40 * UNIT : SIZE // 2] == was[40 * UNIT : SIZE // 2]
                assert kept[SIZE // 2 + 40 * UNIT :] == was[SIZE // 2 + 40 * UNIT :]
                disk.queue.write(SIZE // 2 + 100 * UNIT, noise(random.Random(3), UNIT))
                assert image.status == (ImageStatus.OVERFLOWN, errno.ENOSPC)
                assert errno_of(lambda: view.write(0, data[:UNIT])) == errno.EIO
        assert store.used == 0


def test_an_image_has_one_queue(folder: Path) -> None:
    with (
        engine.Thread() as thread,
        Filtered(folder, "origin", SIZE, [thread]) as disk,
        Arena() as arena,
        storage(folder, SIZE) as store,
        Snapshot([disk], store, arena) as snapshot,
        engine.LocalQueue(thread, image=snapshot.images[0]),
    ):
        assert errno_of(lambda: engine.LocalQueue(thread, image=snapshot.images[0])) == errno.EBUSY


def test_snapshots_go_in_any_order_under_load(folder: Path) -> None:
    """Up to eight at once, of two storages, with writes all the time: each shows its instant to its end."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    die = random.Random(seed)
    with ExitStack() as stack:
        one, two, reader = (stack.enter_context(engine.Thread()) for _ in range(3))
        disk = stack.enter_context(Filtered(folder, "origin", SIZE, [one, two]))
        arena = stack.enter_context(Arena())
        (folder / "a").mkdir()
        (folder / "b").mkdir()
        stores = [stack.enter_context(storage(folder / name, 4 * SIZE, 16 * SIZE)) for name in "ab"]
        stop = threading.Event()
        pause = threading.Event()
        idle = threading.Event()

        def overwrite() -> None:
            other = random.Random(seed + 1)
            while not stop.is_set():
                if pause.is_set():
                    idle.set()
                    pause.wait(0.001)
                    continue
                idle.clear()
                start = other.randrange(SIZE // SECTOR - 64) * SECTOR
                disk.queues[1].write(start, noise(other, 64 * SECTOR))

        writer = threading.Thread(target=overwrite)
        writer.start()
        held: list[tuple[Snapshot, bytes]] = []
        try:
            for _ in range(60):
                if len(held) < 8 and die.random() < 0.6:
                    pause.set()
                    idle.clear()
                    idle.wait()
                    content = read_all(disk.queues[0], SIZE)
                    snapshot = Snapshot([disk], die.choice(stores), arena)
                    snapshot.take()
                    held.append((snapshot, content))
                    pause.clear()
                elif held:
                    held.pop(die.randrange(len(held)))[0].drop()
                for snapshot, content in die.sample(held, min(2, len(held))):
                    with engine.LocalQueue(reader, image=snapshot.images[0]) as view:
                        assert read_all(view, SIZE) == content
        finally:
            stop.set()
            writer.join()
            while held:
                held.pop(die.randrange(len(held)))[0].drop()
        assert [store.used for store in stores] == [0, 0]
        assert arena.free == arena.total
