# SPDX-License-Identifier: MIT
"""Threads whose buffers lie in a file that outlives the process: what is there and not in the storage is not lost."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from tests.own_daemon import wait_until
from tests.unit.engine.disks import UNIT, errno_of, pattern
from tests.unit.engine.test_adoption import ROOM, SIZE, Process, Remains

ENTRY = struct.Struct("<QII")
"""Number of the storage, place, units; one for each page of the buffers, which follow the entries."""

ENTRIES = 1024
OFFSET = 8192


@pytest.fixture
def buffers() -> Iterator[int]:
    """The file."""
    descriptor = os.memfd_create("buffers", os.MFD_CLOEXEC)
    os.posix_fallocate(descriptor, 0, OFFSET + engine.BUFFERS_BYTES)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def disks(folder: Path) -> Path:
    (folder / "origin").write_bytes(pattern(1, SIZE))
    (folder / "storage").write_bytes(bytes(ROOM))
    return folder


def entries(buffers: int) -> bytes:
    return os.pread(buffers, ENTRIES * ENTRY.size, OFFSET)


def test_images_are_right_and_nothing_is_left_in_the_buffers(disks: Path, buffers: int) -> None:
    process = Process(disks, Remains(), buffers=(buffers, OFFSET))
    process.take(1)
    for number in range(100):
        process.write(number * 7 % 64 * 16384, 16384, 2 + number)
    assert process.read(1) == pattern(1, SIZE)
    process.end()
    units = {ENTRY.unpack_from(entries(buffers), at * ENTRY.size)[2] for at in range(ENTRIES)}
    assert units == {0}
    data = os.pread(buffers, engine.BUFFERS_BYTES, OFFSET)[ENTRIES * ENTRY.size :]
    assert pattern(1, SIZE)[: 4 * UNIT] in data, "old data came that way"


@pytest.mark.parametrize("kind", ["stored later", "not stored", "of another storage", "torn"])
def test_what_was_not_stored_is_stored_by_the_successor(disks: Path, buffers: int, kind: str) -> None:
    """Built by hand: what is in a place is moved to a buffer, and the place gets something else."""
    former = Process(disks, Remains())
    former.take(1)
    former.write(0, 4 * UNIT, 2)
    left = former.remains.copy()
    former.leave()
    storage = disks / "storage"
    data = storage.read_bytes()[: 4 * UNIT]
    assert data == pattern(1, 4 * UNIT)
    with open(storage, "r+b") as file:
        file.write(b"\xff" * (4 * UNIT))
    if kind == "torn":
        data = data[:-1] + b"?"
    page = 5
    number = 1 if kind == "of another storage" else 0
    os.pwrite(buffers, ENTRY.pack(number, 0, 4), OFFSET + page * ENTRY.size)
    os.pwrite(buffers, data, OFFSET + ENTRIES * ENTRY.size + page * UNIT)

    successor = Process(disks, left, adopt=True)
    with mmap.mmap(buffers, OFFSET + engine.BUFFERS_BYTES) as memory, memoryview(memory)[OFFSET:] as part:
        if kind != "not stored":
            with engine.Thread() as thread:
                storing = engine.Storing(thread, successor.storage, part)
                wait_until("it is stored", lambda: storing.result is not None)
                assert storing.result == 0
                storing.close()
    successor.sweep()
    if kind == "stored later":
        assert successor.read(1) == pattern(1, SIZE)
    else:
        assert successor.read(1) is None
        assert successor.images[1].status == (ImageStatus.CORRUPTED, errno.EBADMSG)
    successor.end()


def test_an_offset_that_makes_no_sense(buffers: int) -> None:
    assert errno_of(lambda: engine.Thread(buffers=(buffers, 4095))) == errno.EINVAL
