# SPDX-License-Identifier: MIT
"""With a udev that runs: what leads to the origin elsewhere leads to the filtered device, and never to an image."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.host import blockdev
from blksnap_ublk.host.udev import Udev
from blksnap_ublk.install.lvm_filter import PATTERN
from tests import guest_udev
from tests.own_daemon import Disks, OwnDaemon, disks
from tests.partitions import make_partitions, partitions_of

MIB = 1 << 20
BY_UUID, BY_LABEL, BY_PARTUUID = (Path("/dev/disk") / name for name in ("by-uuid", "by-label", "by-partuuid"))

pytestmark = pytest.mark.skipif(
    guest_udev.missing_for_udev() is not None, reason=guest_udev.missing_for_udev() or "udev can be started"
)


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["knows no ublk", "knows ublk"])
def running_udev(daemon: OwnDaemon, request: pytest.FixtureRequest) -> Iterator[None]:
    with guest_udev.udev(daemon.runtime, knows_ublk=request.param):
        yield


@pytest.fixture
def two() -> Iterator[Disks]:
    with disks(48 * MIB) as made:
        yield made


def _file_system(device: str, label: str) -> str:
    """Makes one; its UUID."""
    identity = str(uuid.uuid4())
    subprocess.run(["mkfs.ext4", "-q", "-U", identity, "-L", label, device], check=True, capture_output=True)
    return identity


def _leads(link: Path) -> str | None:
    return str(link.resolve()) if link.is_symlink() else None


def _image(client: Client, device: str, two: Disks, *, partitions: bool = False) -> tuple[str, str]:
    taken = client.create_snapshot([device], storage=[str(two.directory)], limit=64 * MIB, partitions=partitions)
    return taken.id, taken.images[0].image


def test_by_uuid_leads_to_the_filtered_device(client: Client, two: Disks) -> None:
    identity = _file_system(two.origin, "fs-a")
    guest_udev.change(two.origin)
    assert _leads(BY_UUID / identity) == two.origin
    device = client.attach(two.origin, name="data").device
    assert _leads(BY_UUID / identity) == device
    assert _leads(BY_LABEL / "fs-a") == device
    snapshot, image = _image(client, device, two)
    guest_udev.change(two.origin, image)
    assert _leads(BY_UUID / identity) == device
    assert Udev().links(blockdev.device_number(image)) == [f"blksnap/{snapshot}/data"]
    assert Udev().links(blockdev.device_number(two.origin)) == ["blksnap/origins/data"]
    assert "blksnap/data" in Udev().links(blockdev.device_number(device))
    client.destroy_snapshots([snapshot])
    client.detach(device)
    assert _leads(BY_UUID / identity) == two.origin
    assert _leads(BY_LABEL / "fs-a") == two.origin
    assert not Path("/dev/blksnap").exists()


def test_a_file_system_made_on_the_filtered_device_is_found_at_once(client: Client, two: Disks) -> None:
    device = client.attach(two.origin, name="data").device
    identity = _file_system(device, "fs-b")
    guest_udev.settle()
    assert _leads(BY_UUID / identity) == device
    client.detach(device)
    guest_udev.settle()
    assert _leads(BY_UUID / identity) == two.origin


def test_images_are_hidden_from_what_mounts_and_assembles_by_itself(client: Client, two: Disks) -> None:
    _file_system(two.origin, "fs-c")
    device = client.attach(two.origin, name="data").device
    snapshot, image = _image(client, device, two)
    number = blockdev.device_number(image)
    found = {
        key: Udev().property(number, key) for key in ("UDISKS_IGNORE", "SYSTEMD_READY", "ID_FS_TYPE", "ID_FS_UUID")
    }
    assert found == {"UDISKS_IGNORE": "1", "SYSTEMD_READY": "0", "ID_FS_TYPE": None, "ID_FS_UUID": None}
    assert Udev().property(blockdev.device_number(device), "ID_FS_TYPE") == "ext4"
    client.destroy_snapshots([snapshot])
    client.detach(device)


def test_partitions_move_with_their_disk_and_come_back(client: Client, two: Disks) -> None:
    make_partitions(two.origin)
    subprocess.run(["partx", "--add", two.origin], check=True)
    first = partitions_of(two.origin)[0]
    identity = _file_system(first, "fs-d")
    guest_udev.change(two.origin, *partitions_of(two.origin))
    number = Udev().property(blockdev.device_number(first), "ID_PART_ENTRY_UUID")
    assert number
    assert _leads(BY_PARTUUID / number) == _leads(BY_UUID / identity) == first
    try:
        device = client.attach(two.origin, name="data").device
        assert _leads(BY_PARTUUID / number) == _leads(BY_UUID / identity) == f"{device}p1"
        assert _leads(Path("/dev/blksnap/data-part1")) == f"{device}p1"
        # Writing to it makes udev ask the kernel for partitions of disks that it watches.
        snapshot, image = _image(client, device, two)
        os.close(os.open(image, os.O_RDWR))
        guest_udev.settle()
        assert partitions_of(image) == []
        client.destroy_snapshots([snapshot])
        snapshot, image = _image(client, device, two, partitions=True)
        assert _leads(BY_PARTUUID / number) == _leads(BY_UUID / identity) == f"{device}p1"
        assert Udev().links(blockdev.device_number(f"{image}p1")) == [f"blksnap/{snapshot}/data-part1"]
        client.destroy_snapshots([snapshot])
        client.detach(device)
        assert _leads(BY_PARTUUID / number) == _leads(BY_UUID / identity) == first
    finally:
        subprocess.run(["partx", "--delete", two.origin], check=True)


def test_lvm_uses_the_filtered_device_only(client: Client, two: Disks) -> None:
    if shutil.which("lvm") is None:
        pytest.skip("no lvm2")

    def lvm(*arguments: str, pattern: str = PATTERN) -> str:
        settings = f'devices {{ global_filter = [ "{pattern}" ] }} activation {{ udev_sync = 0 udev_rules = 0 }}'
        done = subprocess.run(["lvm", *arguments, "--config", settings], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("WARNING" in done.stderr) == (pattern != PATTERN), done.stderr
        return done.stdout

    lvm("pvcreate", "--yes", two.origin)
    lvm("vgcreate", "vg-of-test", two.origin)
    device = client.attach(two.origin, name="data").device
    snapshot, _ = _image(client, device, two)
    listed = lvm("pvs", "--noheadings", "-o", "pv_name,vg_name").split()
    assert listed[1] == "vg-of-test"
    assert os.path.realpath(listed[0]) == device
    assert len(listed) == 2
    assert "vg-of-test" in lvm("vgscan")
    lvm("vgscan", pattern="a|.*|")  # what happens without our filter
    client.destroy_snapshots([snapshot])
    client.detach(device)
    assert lvm("pvs", "--noheadings", "-o", "pv_name").split() == [two.origin]
    lvm("vgremove", "--yes", "vg-of-test")
