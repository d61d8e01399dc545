# SPDX-License-Identifier: MIT
"""An exclusive open that is refused names who has the device."""

import os
import shutil

import pytest

from blksnap_ublk.errors import Busy, Failed, NotFound
from blksnap_ublk.host import blockdev, holders
from blksnap_ublk.host.claim import open_exclusive
from tests.loop_devices import process, run
from tests.unit.host.conftest import MIB, Disks

HOLD = "import os,sys; f=os.open(sys.argv[1], int(sys.argv[2])); print('open', flush=True); sys.stdin.read()"


def test_the_claim_excludes_a_second_one_until_it_is_closed(disks: Disks) -> None:
    path = disks.disk()
    descriptor = open_exclusive(path)
    try:
        with pytest.raises(Busy, match=rf"{path}: in use by process {os.getpid()} \(.*\) \(EBUSY\); end it first"):
            open_exclusive(path)
    finally:
        os.close(descriptor)
    os.close(open_exclusive(path))


def test_another_process_is_named(disks: Disks) -> None:
    path = disks.disk()
    with process(HOLD, path, str(os.O_RDWR | os.O_EXCL)) as child, pytest.raises(Busy, match=f"process {child.pid} "):
        open_exclusive(path)


def test_a_mount_is_named(disks: Disks) -> None:
    path = disks.disk()
    point = disks.mounted(path)
    with pytest.raises(Busy) as caught:
        open_exclusive(path)
    assert str(caught.value) == f"{path}: in use by mount {point} (EBUSY); unmount it first"


def test_a_mount_of_a_partition_is_named_for_the_disk(disks: Disks) -> None:
    path = disks.with_partitions((2048, 16384))
    point = disks.mounted(path + "p1")
    with pytest.raises(Busy, match=f"mount {point} on {path}p1 "):
        open_exclusive(path)


def test_a_mount_of_the_disk_is_named_for_a_partition(disks: Disks) -> None:
    path = disks.with_partitions((2048, 16384))
    descriptor = open_exclusive(path)
    try:
        with pytest.raises(Busy, match=f"process {os.getpid()} "):
            open_exclusive(path + "p1")
    finally:
        os.close(descriptor)


def test_a_stacked_device_is_named(disks: Disks) -> None:
    if not shutil.which("dmsetup"):
        pytest.skip("no dmsetup")
    path = disks.disk()
    try:
        above = disks.linear(f"bsu-test-{os.getpid()}", path, 2048)
    except AssertionError as error:
        pytest.skip(f"no device-mapper here: {error}")
    with pytest.raises(Busy, match=rf"device {above} \(bsu-test-{os.getpid()}\) \(EBUSY\); remove it first"):
        open_exclusive(path)


def test_swap_is_named(disks: Disks) -> None:
    if not shutil.which("mkswap"):
        pytest.skip("no mkswap")
    path = disks.disk()
    run("mkswap", path)
    try:
        run("swapon", path)
    except AssertionError as error:
        pytest.skip(f"no swap here: {error}")
    try:
        with pytest.raises(Busy, match=rf"in use by swap \(EBUSY\); swapoff {path} first"):
            open_exclusive(path)
    finally:
        run("swapoff", path)


def test_a_read_only_device_is_refused(disks: Disks) -> None:
    with pytest.raises(Failed, match="read-only"):
        open_exclusive(disks.disk("disk", MIB, "--read-only"))


def test_a_missing_device_is_not_found() -> None:
    with pytest.raises(NotFound):
        open_exclusive("/dev/no-such-device")


def test_openers_without_a_claim_are_listed_those_of_partitions_too(disks: Disks) -> None:
    path = disks.with_partitions((2048, 4096))
    number = blockdev.device_number(path)
    with process(HOLD, path + "p1", str(os.O_RDONLY)) as child:
        found = [opener for opener in holders.openers(number) if opener.pid == child.pid]
        assert [opener.node for opener in found] == [path + "p1"]
        assert found[0].command.startswith("python")
        assert not [opener for opener in holders.openers(number, ignore=[child.pid]) if opener.pid == child.pid]
        os.close(open_exclusive(path))


def test_a_loop_device_on_the_device_is_a_claim(disks: Disks) -> None:
    path = disks.disk()
    above = disks.on_device(path)
    assert [holder.text for holder in holders.claims(blockdev.device_number(path))] == [f"device {above}"]
