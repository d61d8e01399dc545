# SPDX-License-Identifier: MIT
"""Where a file lies on its device: read back from the device, on a real file system on a loop device."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk.client.file_ranges import file_ranges
from blksnap_ublk.errors import Unsupported

SIZE = 64 << 20


class Disk:
    """An ext4 on a loop device, or on the one partition of it."""

    def __init__(self, device: str, mount: Path) -> None:
        self.device = device
        self.mount = mount


@pytest.fixture(params=[False, True], ids=["whole", "partition"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(SIZE)
    attached = subprocess.run(["losetup", "-Pf", "--show", image], capture_output=True, text=True, check=False)
    if attached.returncode != 0:
        pytest.skip(f"no loop device can be had: {attached.stderr.strip()}")
    device = attached.stdout.strip()
    try:
        node = device
        if request.param:
            subprocess.run(["sfdisk", "-q", device], input=b"start=2048\n", check=True)
            # Not every kernel reads the table by itself, and not every system has a node for what it found.
            subprocess.run(["partx", "-u", device], check=True)
            name = os.path.basename(device)
            with open(f"/sys/block/{name}/{name}p1/dev") as number:
                major, minor = number.read().split(":")
            node = str(tmp_path / "partition")
            os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(int(major), int(minor)))
        subprocess.run(["mkfs.ext4", "-qF", node], check=True)
        subprocess.run(["mount", node, mount], check=True)
        try:
            yield Disk(device, mount)
        finally:
            subprocess.run(["umount", mount], check=True)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_the_ranges_hold_the_file(disk: Disk) -> None:
    path = disk.mount / "file"
    content = os.urandom(3 << 20)
    path.write_bytes(content)
    ranges = file_ranges(str(path), disk.device)
    with open(disk.device, "rb") as device:
        found = b"".join(os.pread(device.fileno(), r.length, r.start) for r in ranges)
    assert found[: len(content)] == content
    (disk.mount / "empty").touch()
    assert file_ranges(str(disk.mount / "empty"), disk.device) == []


def test_a_file_on_another_device(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(Unsupported, match=r"does not lie directly on .*; use --range"):
        file_ranges(str(tmp_path / "file"), disk.device)
