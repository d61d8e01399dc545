# SPDX-License-Identifier: MIT
"""A device whose origin has grown: its images keep their size, and nothing that was marked is forgotten."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import Device
from tests.unit.engine.disks import (
    TRACKING_BLOCK,
    Arena,
    Filtered,
    Snapshot,
    errno_of,
    memory,
    pattern,
    read_all,
    storage,
)

KIB = 1 << 10


def grow(disk: Filtered, size: int, images: list[engine.Image]) -> None:
    """The file, then the device."""
    with disk.path.open("r+b") as file:
        file.truncate(size)
    blocks = -(-size // TRACKING_BLOCK)
    bitmap, swallowed = memory(-(-blocks // 8)), memory(-(-blocks // 8))
    disk.device.resize(size, bitmap, swallowed, images, limit_ms=2000)
    engine.settle(disk.device)
    disk.size, disk.blocks, disk.bitmap = size, blocks, bitmap


def filled(length: int, seed: int) -> object:
    data = memory(length)
    data[:length] = pattern(seed, length)
    return data


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 512, (1 << 20) - 3 * 512])
@pytest.mark.parametrize("zero_copy", [True, False])
def test_images_show_what_they_showed(tmp_path: Path, size: int, zero_copy: bool) -> None:
    with (
        engine.Thread() as thread,
        Arena() as arena,
        storage(tmp_path, 8 << 20) as room,
        Filtered(tmp_path, "disk", size, [thread], zero_copy=zero_copy) as disk,
    ):
        first = Snapshot([disk], room, arena)
        first.take()
        before = disk.path.read_bytes()
        disk.queue.write(64 * KIB, filled(8 * KIB, 3))
        grow(disk, 600 << 20, first.images)
        disk.queue.write(size - 512, filled(64 * KIB, 4))
        disk.queue.write(512 << 20, filled(64 * KIB, 5))
        second = Snapshot([disk], room, arena)
        second.take()
        disk.queue.write(512 << 20, filled(16 * KIB, 6))
        disk.queue.write(0, filled(128 * KIB, 7))
        disk.queue.write(size - 512, filled(4 * KIB, 8))
        with engine.LocalQueue(thread, image=first.images[0]) as reader:
            assert read_all(reader, size) == before
            assert errno_of(lambda: reader.read(size, memory(4096))) == errno.EINVAL
            reader.write(size // 4096 * 4096 - 4096, filled(4096, 9))
        with engine.LocalQueue(thread, image=second.images[0]) as reader:
            late = memory(64 * KIB)
            reader.read(512 << 20, late)
            assert late[: 64 * KIB] == pattern(5, 64 * KIB)
        second.drop()
        with engine.LocalQueue(thread, image=first.images[0]) as reader:
            shown = read_all(reader, size)
            assert shown[: size // 4096 * 4096 - 4096] == before[: size // 4096 * 4096 - 4096]
            assert shown[size // 4096 * 4096 :] == before[size // 4096 * 4096 :]
        first.drop()
        assert room.used == 0
        assert arena.free == arena.total


def test_what_was_marked_stays_marked_and_what_is_added_counts_as_changed(tmp_path: Path) -> None:
    size = 1 << 20
    with (
        engine.Thread() as thread,
        Arena() as arena,
        storage(tmp_path, 8 << 20) as room,
        Filtered(tmp_path, "disk", size, [thread]) as disk,
    ):
        disk.queue.write(3 * TRACKING_BLOCK, filled(4096, 1))
        with Snapshot([disk], room, arena) as held:
            disk.queue.write(5 * TRACKING_BLOCK, filled(4096, 1))
            grow(disk, 2 * size, held.images)
            assert disk.marked() == {5, *range(16, 32)}
            with engine.LocalQueue(thread, image=held.images[0]) as writer:
                writer.write(7 * TRACKING_BLOCK, filled(4096, 2))
            assert disk.marked() == {5, 7, *range(16, 32)}
            grow(disk, 2 * size + 512, held.images)
            assert disk.marked() == {5, 7, *range(16, 33)}


def test_it_does_not_shrink(tmp_path: Path) -> None:
    with engine.Thread() as thread, Filtered(tmp_path, "disk", 1 << 20, [thread]) as disk:
        device: Device = disk.device
        for size in (1 << 19, (1 << 20) + 100):
            wrong = errno_of(lambda size=size: device.resize(size, memory(4096), memory(4096), limit_ms=100))  # type: ignore[misc]
            assert wrong == errno.EINVAL
        assert device.size == 1 << 20
