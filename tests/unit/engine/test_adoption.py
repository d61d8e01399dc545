# SPDX-License-Identifier: MIT
"""What a process leaves of its snapshots in shared state is adopted by another engine: nothing is lost or wrong."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from tests.unit.engine.disks import TRACKING_BLOCK, UNIT, errno_of, make_file, memory, pattern, read_all

SIZE = 2 << 20
ROOM = 4 << 20
BITMAP = (SIZE // TRACKING_BLOCK + 7) // 8
LEAF, TABLE = 256, 4096


@dataclass
class Remains:
    """Shared memory that outlives an engine: by their order in the chain the states of its images."""

    portions: list[mmap.mmap] = field(default_factory=lambda: [memory(engine.ARENA_PORTION)])
    storage: mmap.mmap = field(default_factory=lambda: memory(engine.STORAGE_STATE_BYTES))
    records: mmap.mmap = field(default_factory=lambda: memory(ROOM // UNIT * 16))
    bitmap: mmap.mmap = field(default_factory=lambda: memory(BITMAP))
    swallowed: mmap.mmap = field(default_factory=lambda: memory(BITMAP))
    images: dict[int, mmap.mmap] = field(default_factory=dict)

    def copy(self) -> Remains:
        """As a kill -9 leaves it: what the dying process does to its own afterwards is not seen here."""
        return Remains(
            [_copy(each) for each in self.portions],
            _copy(self.storage),
            _copy(self.records),
            _copy(self.bitmap),
            _copy(self.swallowed),
            {serial: _copy(each) for serial, each in self.images.items()},
        )


def _copy(of: mmap.mmap) -> mmap.mmap:
    made = memory(len(of))
    made[:] = of[:]
    return made


class Process:
    """An engine with one filtered device and images of it in one storage."""

    def __init__(
        self, folder: Path, remains: Remains, *, adopt: bool = False, buffers: tuple[int, int] | None = None
    ) -> None:
        self.remains = remains
        self._stack = ExitStack()
        stack = self._stack
        self.thread = stack.enter_context(engine.Thread(buffers=buffers))
        self.origin = stack.enter_context(_open(folder / "origin"))
        self.file = stack.enter_context(_open(folder / "storage", storage=True))
        self.arena = stack.enter_context(engine.Arena())
        for portion in remains.portions:
            self.arena.add(portion, adopt=adopt)
        if adopt:
            remains.portions.append(memory(engine.ARENA_PORTION))
            self.arena.add(remains.portions[-1])
        self.storage = stack.enter_context(engine.Storage(remains.storage, unit=UNIT, adopt=adopt))
        self.storage.add_area(self.file, 0, ROOM, remains.records)
        self.device = stack.enter_context(
            engine.Device(
                size=SIZE,
                unit=UNIT,
                tracking_block=TRACKING_BLOCK,
                origin=self.origin,
                bitmap=remains.bitmap,
                swallowed=remains.swallowed,
            )
        )
        self.images: dict[int, engine.Image] = {}
        self.refused: list[int] = []
        for serial in sorted(remains.images) if adopt else ():
            self._adopt(serial)
        self.queue = engine.LocalQueue(self.thread, device=self.device)
        self.readers: dict[int, engine.LocalQueue] = {}

    def _adopt(self, serial: int) -> None:
        state = self.remains.images[serial]
        adopted = engine.Adopted(SIZE, (self.remains.bitmap, self.remains.bitmap))
        try:
            image = engine.Image(self.device, self.storage, self.arena, state, serial=serial, adopt=adopted)
        except OSError as error:
            if error.errno != errno.EBADMSG:
                raise
            self.refused.append(serial)
            for older in self.images.values():
                older.break_(ImageStatus.CORRUPTED, errno.EBADMSG)
            return
        self.images[serial] = image

    def take(self, serial: int) -> None:
        state = self.remains.images[serial] = memory(engine.Image.state_bytes(SIZE, UNIT))
        image = engine.Image(self.device, self.storage, self.arena, state, serial=serial)
        self.device.prepare_take(image)
        engine.switch_all([self.device], [None])
        engine.settle(self.device)
        self.images[serial] = image

    def sweep(self) -> None:
        lost = self.refused
        with engine.Sweep(self.arena, [self.storage], list(self.images.values()), lost=lost) as sweep:
            assert sweep.run()
        self.storage.end_quarantine()

    def serve(self, serial: int) -> engine.LocalQueue:
        if serial not in self.readers:
            self.readers[serial] = engine.LocalQueue(self.thread, image=self.images[serial])
        return self.readers[serial]

    def read(self, serial: int) -> bytes | None:
        """None where the image says that it cannot be trusted."""
        try:
            return read_all(self.serve(serial), SIZE)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return None

    def write(self, start: int, length: int, seed: int, *, image: int | None = None) -> None:
        data = memory(length)
        data[:length] = pattern(seed, length)
        (self.queue if image is None else self.serve(image)).write(start, data)

    def drop(self, serial: int) -> None:
        if serial in self.readers:
            self.readers.pop(serial).finish()
        image = self.images.pop(serial)
        self.device.prepare_drop(image)
        if self.device.begin_drop():
            engine.switch_all([self.device], [None])
        else:
            self.device.drop_now()
        engine.settle(self.device)
        image.close()
        del self.remains.images[serial]

    def end(self) -> None:
        """Everything is given back; places and map memory are all free then."""
        for serial in list(self.images):
            self.drop(serial)
        assert self.storage.used == 0
        assert self.arena.free == self.arena.total
        self.leave()

    def leave(self) -> None:
        for reader in self.readers.values():
            reader.finish()
        self.readers.clear()
        self.queue.finish()
        for image in list(self.images.values()):
            self.device.prepare_drop(image)
            engine.switch_all([self.device], [None])
            engine.settle(self.device)
            image.close()
        self.images.clear()
        self._stack.close()


def _open(path: Path, *, storage: bool = False) -> engine.File:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return engine.File(fd, storage=storage)
    finally:
        os.close(fd)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_file(tmp_path / "origin", SIZE, seed=1, direct=False).close()
    make_file(tmp_path / "storage", ROOM, storage=True, direct=False).close()
    return tmp_path


def prepared(folder: Path) -> tuple[Process, dict[int, bytes]]:
    """Two images with data of their own, of each other and of the image itself; what they show."""
    process = Process(folder, Remains())
    process.take(1)
    process.write(0, 64 << 10, 2)
    process.write(300 << 10, 4096, 3)
    process.take(2)
    process.write(32 << 10, 64 << 10, 4)
    process.write(1 << 20, 512 << 10, 5)
    process.write(8 << 10, 6000 // 512 * 512, 6, image=1)
    shown = {serial: process.read(serial) for serial in (1, 2)}
    assert None not in shown.values()
    return process, {serial: content for serial, content in shown.items() if content is not None}


def test_images_are_the_same_in_the_next_process(folder: Path) -> None:
    former, shown = prepared(folder)
    remains = former.remains.copy()
    used = former.storage.used
    process = Process(folder, remains, adopt=True)
    assert not process.refused
    process.write(64 << 10, 256 << 10, 7)
    process.sweep()
    assert {serial: process.read(serial) for serial in (1, 2)} == shown
    assert process.storage.used == used + process.images[2].preserved - former.images[2].preserved
    process.write(0, SIZE, 8)
    process.take(3)
    process.write(0, SIZE // 2, 9)
    assert {serial: process.read(serial) for serial in (1, 2)} == shown
    assert process.read(3) == pattern(8, SIZE)
    process.drop(2)
    assert process.read(1) == shown[1]
    process.end()
    former.leave()


def test_again_and_again(folder: Path) -> None:
    process, shown = prepared(folder)
    dead = []
    for number in range(5):
        dead.append(process)
        process = Process(folder, process.remains.copy(), adopt=True)
        process.write(number * 128 << 10, 128 << 10, number)
        process.sweep()
        assert {serial: process.read(serial) for serial in (1, 2)} == shown
    process.end()
    for each in dead:
        each.leave()


@pytest.mark.parametrize("broken", [ImageStatus.OVERFLOWN, ImageStatus.CORRUPTED])
def test_what_was_broken_stays_broken(folder: Path, broken: ImageStatus) -> None:
    former, shown = prepared(folder)
    former.images[1].break_(broken, errno.ENOSPC)
    process = Process(folder, former.remains.copy(), adopt=True)
    process.sweep()
    assert process.images[1].status == (broken, errno.ENOSPC)
    assert process.read(1) is None
    assert process.read(2) == shown[2]
    process.end()
    former.leave()


def test_places_of_a_dead_process_are_not_given_out_before_its_io_has_ended(folder: Path) -> None:
    former, shown = prepared(folder)
    remains = former.remains.copy()
    process = Process(folder, remains, adopt=True)
    [high_water] = struct.unpack_from("<Q", remains.storage, 16)
    process.write(600 << 10, 64 << 10, 7)
    [after] = struct.unpack_from("<Q", remains.storage, 16)
    assert after == high_water + 16
    process.sweep()
    assert {serial: process.read(serial) for serial in (1, 2)} == shown
    process.end()
    former.leave()


def _flips(remains: Remains) -> Iterator[tuple[str, mmap.mmap, int]]:
    """What a small map consists of, each byte once: images, tables, leaves, records, the storage's own state."""
    for serial, state in remains.images.items():
        yield from ((f"image {serial}", state, at) for at in (*range(64), *range(4096, 4104)))
    used = remains.portions[0]
    yield from (("map", used, at) for at in range(len(used)) if used[at])
    yield from (("records", remains.records, at) for at in range(len(remains.records)) if remains.records[at])
    yield from (("storage", remains.storage, at) for at in range(64))


def _outcome(folder: Path, remains: Remains, shown: dict[int, bytes]) -> None:
    """Adopts damaged state: each image shows what it showed, or says that it cannot be trusted."""
    try:
        process = Process(folder, remains, adopt=True)
    except OSError as error:
        if error.errno != errno.EBADMSG:  # the storage itself: all that lies in it is lost
            raise
        return
    try:
        process.write(960 << 10, 128 << 10, 7)
        process.sweep()
        for serial in process.images:
            found = process.read(serial)
            assert found is None or found == shown[serial]
        process.write(0, SIZE, 8)
        for serial in process.images:
            found = process.read(serial)
            assert found is None or found == shown[serial]
    finally:
        process.leave()


def test_a_flipped_bit_is_never_wrong_data(folder: Path) -> None:
    """One bit of each seventh byte, another one with each; all bits of all bytes with BSU_ALL_BITS=1."""
    former, shown = prepared(folder)
    original = (folder / "origin").read_bytes()
    kept = (folder / "storage").read_bytes()
    everything = os.environ.get("BSU_ALL_BITS") == "1"
    for number, (_what, place, at) in enumerate(list(_flips(former.remains))[:: 1 if everything else 7]):
        for bit in range(8) if everything else (number % 8,):
            place[at] ^= 1 << bit
            damaged = former.remains.copy()
            place[at] ^= 1 << bit
            _outcome(folder, damaged, shown)
            (folder / "origin").write_bytes(original)
            (folder / "storage").write_bytes(kept)
    former.leave()


def test_only_before_queues_and_other_memory(folder: Path) -> None:
    former, _ = prepared(folder)
    remains = former.remains.copy()
    process = Process(folder, Remains())
    state = remains.images[1]
    adopted = engine.Adopted(SIZE)
    assert errno_of(
        lambda: engine.Image(process.device, process.storage, process.arena, state, serial=1, adopt=adopted)
    ) in (errno.EBUSY, errno.EBADMSG)
    assert errno_of(lambda: process.arena.add(remains.portions[0], adopt=True)) == errno.EBUSY
    process.end()
    former.leave()
