# SPDX-License-Identifier: MIT
import os
import shutil

import pytest

from blksnap_ublk.host import blockdev, mounts, stack
from blksnap_ublk.host.number import DeviceNumber
from tests.loop_devices import process, run
from tests.unit.host.conftest import Disks

LINES = r"""36 35 98:0 /mnt1 /mnt2/a\040b rw,noatime master:1 - ext3 /dev/root rw,errors=continue
40 35 0:44 / /mnt/x rw shared:2 master:3 - btrfs /dev/sda\0401 ro,space_cache
broken line
"""
OTHER_NAMESPACE = (
    "import ctypes,subprocess,sys\n"
    "assert ctypes.CDLL(None).unshare(0x20000) == 0\n"
    "subprocess.run(['mount', '--make-rprivate', '/'], check=True)\n"
    "subprocess.run(['mount', sys.argv[1], sys.argv[2]], check=True)\n"
    "print('mounted', flush=True); sys.stdin.read()"
)


def test_mountinfo_is_read_with_escapes_and_optional_fields() -> None:
    first, second = mounts.parse_mountinfo(LINES, pid=7)
    assert (first.device, first.root, first.point) == (DeviceNumber(98, 0), "/mnt1", "/mnt2/a b")
    assert (first.filesystem, first.source, first.read_only, first.pid) == ("ext3", "/dev/root", False, 7)
    assert (second.device, second.source, second.read_only) == (DeviceNumber(0, 44), "/dev/sda 1", True)
    assert str(first) == "mount /mnt2/a b (in the mount namespace of process 7)"


def test_paths_that_are_not_utf8_survive() -> None:
    assert os.fsencode(mounts.unescape("/a\\377\\134b")) == b"/a\xff\\b"


def test_own_mounts_have_a_root() -> None:
    assert any(mount.point == "/" for mount in mounts.own_mounts())


def test_a_mount_is_found_on_its_device(disks: Disks) -> None:
    path = disks.disk()
    number = blockdev.device_number(path)
    assert stack.mounts_above(number) == []
    point = disks.mounted(path, "with blank")
    assert [(mount.point, mount.pid) for mount in stack.mounts_above(number)] == [(str(point), None)]
    assert stack.devices_beneath_file(str(point)) == {number}


def test_a_mount_of_another_namespace_is_found(disks: Disks) -> None:
    path = disks.disk()
    run("mkfs.ext4", "-q", path)
    point = disks.directory / "hidden"
    point.mkdir()
    with process(OTHER_NAMESPACE, path, str(point)) as child:
        found = [(mount.point, mount.pid) for mount in stack.mounts_above(blockdev.device_number(path))]
        assert found == [(str(point), child.pid)]


def test_files_on_an_overlay_lie_on_the_devices_of_its_layers(disks: Disks) -> None:
    path = disks.disk()
    base = disks.mounted(path)
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir()
    layers = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    try:
        run("mount", "-t", "overlay", "overlay", "-o", layers, str(base / "merged"))
    except AssertionError as error:
        pytest.skip(f"no overlay here: {error}")
    try:
        (base / "merged/file").touch()
        assert stack.devices_beneath_file(str(base / "merged/file")) == {blockdev.device_number(path)}
    finally:
        run("umount", str(base / "merged"))


def test_all_devices_of_a_btrfs_are_found(disks: Disks) -> None:
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("no mkfs.btrfs")
    paths = [disks.disk(name, 128 << 20) for name in ("one", "two")]
    run("mkfs.btrfs", "-q", *paths)
    point = disks.directory / "btrfs"
    point.mkdir()
    run("mount", "-o", f"device={paths[0]}", paths[1], str(point))
    try:
        numbers = {blockdev.device_number(path) for path in paths}
        assert stack.devices_beneath_file(str(point)) == numbers
        for number in numbers:
            assert [mount.point for mount in stack.mounts_above(number)] == [str(point)]
    finally:
        run("umount", str(point))
