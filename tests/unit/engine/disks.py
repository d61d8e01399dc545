# SPDX-License-Identifier: MIT
"""Files that stand for disks, and all that belongs to a filtered device and its snapshots on them."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from blksnap_ublk import engine

UNIT = 4096
TRACKING_BLOCK = 65536


def make_file(
    path: Path, size: int, *, seed: int | None = None, storage: bool = False, direct: bool = True
) -> engine.File:
    """A file of `size` bytes, random if seeded, otherwise written zeroes, as the engine sees it."""
    path.write_bytes(pattern(seed, size) if seed is not None else bytes(size))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        return engine.File(fd, storage=storage)
    finally:
        os.close(fd)


def errno_of(action: Callable[[], object]) -> int | None:
    """The errno of the OSError that `action` raises, None when it succeeds."""
    try:
        action()
    except OSError as error:
        return error.errno
    return None


def pattern(seed: int, size: int) -> bytes:
    """`size` bytes that differ in each 8-byte word and with each seed."""
    words = mmap.PAGESIZE // 8
    page = bytearray(mmap.PAGESIZE)
    pages = []
    for number in range((size + mmap.PAGESIZE - 1) // mmap.PAGESIZE):
        page[:8] = (seed << 32 | number).to_bytes(8, "little")
        page[8:] = (number * 0x9E3779B97F4A7C15 + seed & (1 << 64) - 1).to_bytes(8, "little") * (words - 1)
        pages.append(bytes(page))
    return b"".join(pages)[:size]


def memory(size: int) -> mmap.mmap:
    """Page-aligned zeroed memory, at least a page."""
    return mmap.mmap(-1, max(size, mmap.PAGESIZE))


def read_all(queue: engine.LocalQueue, size: int, *, step: int = 1 << 20) -> bytes:
    """Everything that a queue serves."""
    parts = []
    for start in range(0, size, step):
        length = min(step, size - start)
        part = memory(length)
        with memoryview(part)[:length] as wanted:
            queue.read(start, wanted)
        parts.append(part[:length])
    return b"".join(parts)


class Filtered:
    """A filtered device on a file, with tracking, served by one local queue on each of the threads given."""

    def __init__(
        self,
        folder: Path,
        name: str,
        size: int,
        threads: Sequence[engine.Thread],
        *,
        zero_copy: bool = True,
        depth: int = 32,
    ) -> None:
        self.size = size
        self.path = folder / name
        self.file = make_file(self.path, size, seed=len(name) + 7)
        self.blocks = (size + TRACKING_BLOCK - 1) // TRACKING_BLOCK
        self.bitmap = self.new_bitmap()
        self.device = engine.Device(
            size=size,
            unit=UNIT,
            tracking_block=TRACKING_BLOCK,
            origin=self.file,
            bitmap=self.bitmap,
            swallowed=self.new_bitmap(),
        )
        self.queues = [
            engine.LocalQueue(thread, device=self.device, zero_copy=zero_copy, depth=depth) for thread in threads
        ]

    def new_bitmap(self) -> mmap.mmap:
        return memory((self.blocks + 7) // 8)

    @property
    def queue(self) -> engine.LocalQueue:
        return self.queues[0]

    def marked(self) -> set[int]:
        """Tracking blocks that are marked in the active bitmap."""
        return {block for block in range(self.blocks) if self.bitmap[block // 8] >> (block % 8) & 1}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for queue in self.queues:
            queue.finish()
        self.device.close()
        self.file.close()


class Arena(engine.Arena):
    """Map memory with a number of portions."""

    def __init__(self, portions: int = 1) -> None:
        super().__init__()
        for _ in range(portions):
            self.add(memory(engine.ARENA_PORTION))


@contextlib.contextmanager
def storage(folder: Path, *sizes: int) -> Iterator[engine.Storage]:
    """A difference storage of one file for each size; a pair (offset, length) takes a part of a larger file."""
    files = []
    with engine.Storage(memory(engine.STORAGE_STATE_BYTES), unit=UNIT) as made:
        for number, size in enumerate(sizes):
            file = make_file(folder / f"storage{number}", size, storage=True)
            files.append(file)
            if size >= UNIT:
                made.add_area(file, 0, size, memory(made.records_bytes(size)))
        yield made
    for file in files:
        file.close()


class Snapshot:
    """Images of devices at one instant. `take()` makes them; `drop()` takes them out again."""

    _serial = 0

    def __init__(self, members: Sequence[Filtered], storage: engine.Storage, arena: engine.Arena) -> None:
        self.members = members
        self.images = []
        for member in members:
            Snapshot._serial += 1
            state = memory(engine.Image.state_bytes(member.size, UNIT))
            self.images.append(engine.Image(member.device, storage, arena, state, serial=Snapshot._serial))
        self.taken = False

    def take(self, *, limit_ms: int = 2000) -> int:
        """Nanoseconds that the first gate was closed."""
        bitmaps = [member.new_bitmap() for member in self.members]
        prepared = []
        try:
            for member, image in zip(self.members, self.images, strict=True):
                member.device.prepare_take(image)
                prepared.append(member.device)
            gate = engine.switch_all([member.device for member in self.members], bitmaps, limit_ms=limit_ms).ns
        except OSError:
            for device in prepared:
                device.cancel()
            raise
        for member, bitmap in zip(self.members, bitmaps, strict=True):
            engine.settle(member.device)
            member.bitmap = bitmap
        self.taken = True
        return gate

    def drop(self) -> None:
        if self.taken:
            devices = [member.device for member in self.members]
            for device, image in zip(devices, self.images, strict=True):
                device.prepare_drop(image)
            engine.switch_all(devices, [None] * len(devices), limit_ms=10_000)
            for device in devices:
                engine.settle(device)
            self.taken = False
        for image in self.images:
            image.close()

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()
