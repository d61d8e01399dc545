# SPDX-License-Identifier: MIT
import os
from pathlib import Path

import pytest

from blksnap_ublk.errors import NotFound, UsageError
from blksnap_ublk.host import blockdev
from blksnap_ublk.host.number import DeviceNumber
from tests.unit.host.conftest import MIB, Disks


def test_a_loop_device_is_described_through_a_symlink(disks: Disks) -> None:
    path = disks.disk("disk", 16 * MIB, "--sector-size", "4096")
    link = disks.directory / "link"
    link.symlink_to(path)
    device = blockdev.describe(str(link))
    assert device.path == path
    assert device.number == DeviceNumber.of(os.stat(path).st_rdev)
    assert device.size == 16 * MIB
    assert device.limits.logical_block == 4096
    assert device.limits.dma_alignment & (device.limits.dma_alignment + 1) == 0
    assert device.limits.max_sectors > 0
    assert device.limits.zoned == "none"
    assert device.limits.integrity is None
    assert not device.read_only
    assert not device.is_partition
    assert device.ublk_id is None


def test_read_only_is_seen(disks: Disks) -> None:
    assert blockdev.describe(disks.disk("disk", MIB, "--read-only")).read_only


def test_a_node_by_another_name_is_led_back_to_the_kernels_own(disks: Disks, tmp_path: Path) -> None:
    path = disks.disk()
    node = tmp_path / "node"
    try:
        os.mknod(node, 0o600 | 0o060000, os.stat(path).st_rdev)
        assert blockdev.describe(str(node)).path == path
    except PermissionError:
        pytest.skip("no device nodes may be made here")


def test_partitions_know_their_disk_and_come_in_order(disks: Disks) -> None:
    path = disks.with_partitions((2048, 4096), (8192, 8192))
    disk = blockdev.describe(path)
    first, second = blockdev.describe(path + "p1"), blockdev.describe(path + "p2")
    assert blockdev.partitions(disk.number) == [first.number, second.number]
    assert first.disk == second.disk == disk.number
    assert first.is_partition
    assert first.size == 4096 * 512
    assert first.limits.logical_block == disk.limits.logical_block
    assert blockdev.partitions(first.number) == []


@pytest.mark.parametrize("path", ["/dev/no-such-device", "/dev/null/x"])
def test_a_missing_device_is_not_found(path: str) -> None:
    with pytest.raises(NotFound, match=path):
        blockdev.describe(path)


@pytest.mark.parametrize("path", ["/dev/null", "/", "/proc/self/status"])
def test_what_is_no_block_device_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="not a block device"):
        blockdev.describe(path)


def test_an_unknown_number_is_not_found() -> None:
    with pytest.raises(NotFound, match="4095:1048575"):
        blockdev.describe_number(DeviceNumber(4095, 1048575))


def test_a_path_with_a_nul_is_wrong_usage() -> None:
    with pytest.raises(UsageError):
        blockdev.describe("/dev/\0")
