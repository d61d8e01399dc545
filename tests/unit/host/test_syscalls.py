# SPDX-License-Identifier: MIT
import os
import stat
from pathlib import Path

import pytest

from blksnap_ublk.host import syscalls
from blksnap_ublk.host.filesystem import room, room_with_reserve, type_of
from blksnap_ublk.host.number import DeviceNumber


def test_statx_agrees_with_stat(tmp_path: Path) -> None:
    path = tmp_path / "ü file"
    path.write_bytes(b"x" * 5000)
    expected = os.stat(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for status in (syscalls.file_status(str(path)), syscalls.file_status(descriptor, cached=True)):
            assert (status.mode, status.inode, status.size) == (expected.st_mode, expected.st_ino, expected.st_size)
            assert status.allocated == expected.st_blocks * 512
            assert status.filesystem == DeviceNumber.of(expected.st_dev)
            assert not status.immutable
    finally:
        os.close(descriptor)


def test_statx_knows_device_nodes() -> None:
    status = syscalls.file_status("/dev/null")
    assert stat.S_ISCHR(status.mode)
    assert status.node == (1, 3)


def test_errors_are_os_errors() -> None:
    with pytest.raises(FileNotFoundError):
        syscalls.file_status("/no/such/file")
    with pytest.raises(OSError, match="Bad file descriptor"):
        syscalls.fallocate(-1, 0, 0, 4096)


def test_a_type_that_is_not_known_has_an_objection() -> None:
    descriptor = os.open("/proc", os.O_RDONLY)
    try:
        assert type_of(descriptor).objection is not None
        assert type_of(descriptor).name == "type 0x9fa0"
    finally:
        os.close(descriptor)


def test_the_reserve_is_kept_out_of_the_room(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        assert 0 <= room_with_reserve(descriptor) <= max(room(descriptor) - (1 << 30), 0)
    finally:
        os.close(descriptor)
