# SPDX-License-Identifier: MIT
"""What the kernel has cached of an origin or of a filtered device is neither lost nor stale at attach and detach."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import Busy
from tests.direct_io import read_at, write_at
from tests.loop_devices import loop_device, partitioned
from tests.own_daemon import wait_until

SIZE = 32 << 20
FIRST_SECTOR = 2048
START = FIRST_SECTOR * 512
PAGE = 4096
OLD, NEW = b"o" * PAGE, b"n" * PAGE


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor that has its place in the page cache: not direct, not exclusive."""
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.fixture
def origin(folder: Path) -> Iterator[str]:
    """A disk with one partition, which begins with `OLD`; so does the disk behind its partition table."""
    image = partitioned(folder / "disk", SIZE, [(FIRST_SECTOR, SIZE // 512 - FIRST_SECTOR)])
    with loop_device(image, options=["--partscan"]) as path:
        wait_until("the partition is there", lambda: os.path.exists(f"{path}p1"))
        write_at(path, START, OLD)
        write_at(path, PAGE, OLD)
        yield path


@pytest.mark.parametrize("part", ["disk", "partition"])
def test_attach_writes_back_what_is_cached_of_the_origin(client: Client, origin: str, part: str) -> None:
    """What somebody has written to the origin, who still has it open, is seen through the filter."""
    node, place, whole = (origin, PAGE, PAGE) if part == "disk" else (f"{origin}p1", 0, START)
    with opened(node, os.O_RDWR) as writer:
        os.pwrite(writer, NEW, place)
        assert read_at_unsynced(origin, whole) == OLD
        device = client.attach(origin).device
        assert read_at(device, whole, PAGE) == NEW
    client.detach(device)


def read_at_unsynced(origin: str, start: int) -> bytes:
    """What the disk's own file holds: a direct read of a node would write back first."""
    backing = Path(f"/sys/block/{Path(origin).name}/loop/backing_file").read_text().strip()
    with Path(backing).open("rb") as file:
        file.seek(start)
        return file.read(PAGE)


@pytest.mark.parametrize("part", ["disk", "partition"])
def test_detach_leaves_no_stale_page_of_the_origin(client: Client, origin: str, part: str) -> None:
    """A node that somebody has open all the time shows what was written through the filter."""
    node, place, whole = (origin, PAGE, PAGE) if part == "disk" else (f"{origin}p1", 0, START)
    with opened(node, os.O_RDONLY) as reader:
        device = client.attach(origin).device
        assert os.pread(reader, PAGE, place) == OLD
        write_at(device, whole, NEW)
        client.detach(device)
        assert os.pread(reader, PAGE, place) == NEW


def write_and_sync(descriptor: int, place: int) -> None:
    os.pwrite(descriptor, OLD, place)
    os.fsync(descriptor)


@pytest.mark.parametrize("part", ["disk", "partition"])
def test_detach_by_force_loses_nothing_that_was_written(client: Client, origin: str, part: str) -> None:
    """The program gets errors from then on; what it wrote before, and never synced, is on the origin."""
    with ExitStack() as stack:
        device = client.attach(origin).device
        node, place, whole = (device, PAGE, PAGE) if part == "disk" else (f"{device}p1", 0, START)
        wait_until("the node is there", lambda: os.path.exists(node))
        writer = stack.enter_context(opened(node, os.O_RDWR))
        os.pwrite(writer, NEW, place)
        with pytest.raises(Busy):
            client.detach(device)
        assert read_at_unsynced(origin, whole) == OLD
        client.detach(device, force=True)
        assert read_at(origin, whole, PAGE) == NEW
        with pytest.raises(OSError, match="Errno"):
            write_and_sync(writer, place)
