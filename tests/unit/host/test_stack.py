# SPDX-License-Identifier: MIT
import os
import shutil

import pytest

from blksnap_ublk.errors import NotFound
from blksnap_ublk.host import blockdev, stack
from blksnap_ublk.host.number import DeviceNumber
from tests.unit.host.conftest import MIB, Disks


def test_a_loop_device_rests_on_the_device_of_its_file(disks: Disks) -> None:
    lower = disks.disk("lower", 32 * MIB)
    point = disks.mounted(lower)
    upper = disks.on_file(point / "upper", 8 * MIB)
    low, up = blockdev.device_number(lower), blockdev.device_number(upper)
    assert low in stack.underlying_devices(up)
    assert up not in stack.underlying_devices(low)
    assert up in stack.devices_above(low)
    assert stack.leaves(up) == stack.leaves(low)
    backing = stack.loop_backing(up)
    assert backing is not None
    assert (backing.path, backing.node, backing.filesystem) == (str(point / "upper"), None, low)


def test_the_file_of_a_loop_device_may_be_deleted(disks: Disks) -> None:
    lower = disks.disk("lower", 32 * MIB)
    point = disks.mounted(lower)
    upper = disks.on_file(point / "upper", 8 * MIB)
    (point / "upper").unlink()
    assert blockdev.device_number(lower) in stack.underlying_devices(blockdev.device_number(upper))


def test_a_loop_device_may_show_a_block_device(disks: Disks) -> None:
    lower = disks.disk()
    upper = disks.on_device(lower)
    assert stack.directly_beneath(blockdev.device_number(upper)) == {blockdev.device_number(lower)}


def test_a_partition_rests_on_its_disk_only(disks: Disks) -> None:
    path = disks.with_partitions((2048, 4096), (8192, 4096))
    disk, first, second = (blockdev.device_number(path + suffix) for suffix in ("", "p1", "p2"))
    assert disk in stack.underlying_devices(first)
    assert second not in stack.underlying_devices(first)
    assert {first, second} <= stack.devices_above(disk)


def test_dm_rests_on_its_members_and_carries_mounts(disks: Disks) -> None:
    if not shutil.which("dmsetup"):
        pytest.skip("no dmsetup")
    path = disks.disk()
    try:
        above = disks.linear(f"bsu-stack-{os.getpid()}", path, 16384)
    except AssertionError as error:
        pytest.skip(f"no device-mapper here: {error}")
    number = blockdev.device_number(path)
    assert number in stack.underlying_devices(blockdev.device_number(above))
    point = disks.mounted(above)
    assert [mount.point for mount in stack.mounts_above(number)] == [str(point)]


def test_a_device_that_has_gone_is_not_found() -> None:
    with pytest.raises(NotFound):
        stack.underlying_devices(DeviceNumber(4095, 1048575))
