# SPDX-License-Identifier: MIT
import mmap
import os
import shutil

import pytest

from blksnap_ublk.errors import Failed, NotFound
from blksnap_ublk.host import blockdev
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.host.pagecache import flush_disk
from tests.unit.host.conftest import Disks


def test_pages_of_an_open_partition_are_dropped_with_those_of_the_disk(disks: Disks) -> None:
    path = disks.with_partitions((2048, 4096))
    reader = os.open(path + "p1", os.O_RDONLY)
    writer = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        assert os.pread(reader, 4096, 0) == bytes(4096)
        with mmap.mmap(-1, 4096) as page:
            page.write(b"x" * 4096)
            assert os.pwrite(writer, page, 2048 * 512) == 4096
        assert os.pread(reader, 4096, 0) == bytes(4096), "the trap: the partition has a page cache of its own"
        assert flush_disk(blockdev.device_number(path)) == [path + "p1", path]
        assert os.pread(reader, 4096, 0) == b"x" * 4096
    finally:
        os.close(reader)
        os.close(writer)


def test_dirty_pages_are_written_back(disks: Disks) -> None:
    path = disks.disk()
    writer = os.open(path, os.O_RDWR)
    try:
        os.pwrite(writer, b"y" * 4096, 8192)
        flush_disk(blockdev.device_number(path))
        assert (disks.directory / "disk").read_bytes()[8192 : 8192 + 4096] == b"y" * 4096
    finally:
        os.close(writer)


def test_the_disk_of_a_partition_is_flushed_too(disks: Disks) -> None:
    path = disks.with_partitions((2048, 4096), (8192, 4096))
    assert flush_disk(blockdev.device_number(path + "p2")) == [path + "p2", path]


def test_a_failed_write_back_is_told(disks: Disks) -> None:
    if not shutil.which("dmsetup"):
        pytest.skip("no dmsetup")
    try:
        path = disks.failing(f"bsu-flush-{os.getpid()}", 2048)
    except AssertionError as error:
        pytest.skip(f"no device-mapper here: {error}")
    writer = os.open(path, os.O_RDWR)
    try:
        os.pwrite(writer, b"z" * 4096, 0)
        with pytest.raises(Failed, match=rf"{path}: .*\(EIO\)"):
            flush_disk(blockdev.device_number(path))
    finally:
        os.close(writer)


def test_a_device_that_has_gone_is_not_found() -> None:
    with pytest.raises(NotFound):
        flush_disk(DeviceNumber(4095, 1048575))
