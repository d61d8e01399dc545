# SPDX-License-Identifier: MIT
"""What `doctor` names as left over, and what it takes away with --fix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.host import blockdev, pinned_files
from blksnap_ublk.host.inode_flags import set_immutable
from blksnap_ublk.host.pinned_files import PinnedFile
from blksnap_ublk.snapshot.disks import Disks
from blksnap_ublk.ublk.control import Control
from tests.direct_io import write_at
from tests.loop_devices import missing_for_loops, mounted
from tests.own_daemon import Disks as TwoDisks
from tests.own_daemon import OwnDaemon, disks, ublk_nodes

MIB = 1 << 20

missing = missing_for_loops()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture
def disk() -> Iterator[TwoDisks]:
    with disks(32 * MIB) as found:
        yield found


def _warnings(findings: list[forms.Finding]) -> dict[str, str]:
    names = ("left-over", "other-daemons", "snapshots", "storage-files", "saved-changes")
    warnings = [each for each in findings if each.state is not forms.FindingState.OK and each.name in names]
    return {each.name: f"{each.text} -> {each.advice}" for each in warnings}


def test_a_device_that_nobody_knows(daemon: OwnDaemon, client: Client, disk: TwoDisks) -> None:
    nodes = ublk_nodes()
    with Control() as control:
        served = Disks(control, daemon.runtime).add_image(blockdev.describe(disk.origin))
        foreign = Disks(control, Path("/run/elsewhere")).add_image(blockdev.describe(disk.origin))
        try:
            warnings = _warnings(client.doctor())
            assert f"/dev/ublkb{served.ublk_id}" in warnings["left-over"]
            assert "--fix" in warnings["left-over"]
            assert f"/dev/ublkb{foreign.ublk_id}" in warnings["other-daemons"]
            repaired = client.repair()
            assert f"left-over: deleted /dev/ublkb{served.ublk_id}" in repaired.fixed
            assert set(_warnings(repaired.findings)) == {"other-daemons"}
        finally:
            Disks(control, Path("/run/elsewhere")).delete(foreign.ublk_id, in_use=True)
    assert _warnings(client.doctor()) == {}
    assert ublk_nodes() == nodes


def test_a_snapshot_that_is_held_in_vain(client: Client, disk: TwoDisks, folder: Path) -> None:
    device = client.attach(disk.origin).device
    storage = folder / "storage"
    storage.write_bytes(bytes(MIB))
    snapshot = client.create_snapshot([device], storage=[f"{storage}:0+2048"])
    assert _warnings(client.doctor()) == {}
    write_at(device, 0, os.urandom(4 * MIB))
    assert f"snapshot destroy {snapshot.id}" in _warnings(client.doctor())["snapshots"]
    client.destroy_snapshots([snapshot.id])
    assert _warnings(client.doctor()) == {}
    client.detach(device)


def test_a_file_that_was_storage_before_a_reboot(
    daemon: OwnDaemon, client: Client, disk: TwoDisks, folder: Path
) -> None:
    with mounted(disk.other, folder / "mount") as directory:
        path = directory / "storage"
        path.touch()
        descriptor = os.open(path, os.O_RDONLY)
        set_immutable(descriptor, True)
        os.close(descriptor)
        saved = Path(daemon.environment["BLKSNAP_UBLK_STATE"])
        pinned_files.remember(saved, [PinnedFile(str(path), path.stat().st_ino)])
        assert str(path) in _warnings(client.doctor())["storage-files"]
        assert f"storage-files: {path} can be changed again" in client.repair().fixed
        path.unlink()
        assert _warnings(client.doctor()) == {}


def test_storage_beneath_a_filter_is_noted_and_no_left_over(
    daemon: OwnDaemon, client: Client, disk: TwoDisks, folder: Path
) -> None:
    device = client.attach(disk.origin).device
    with mounted(device, folder / "mount") as directory:
        path = directory / "storage"
        snapshot = client.create_snapshot([device], storage_files=[str(path)], limit=4 * MIB)
        noted = pinned_files.noted(Path(daemon.environment["BLKSNAP_UBLK_STATE"]))
        assert [file.path for file in noted] == [str(path)]
        assert pinned_files.is_pinned(noted[0])
        assert _warnings(client.doctor()) == {}
        client.destroy_snapshots([snapshot.id])
        assert pinned_files.noted(Path(daemon.environment["BLKSNAP_UBLK_STATE"])) == []
    client.detach(device)
