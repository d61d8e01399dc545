# SPDX-License-Identifier: MIT
"""What cannot be difference storage because somebody's data lies there, or because it would wait for itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from blksnap_ublk.errors import Busy, Unsupported
from tests.direct_io import read_at, write_at
from tests.filtered import filtered, granted_ways
from tests.loop_devices import loop_device, mounted, run
from tests.own_daemon import OwnDaemon

MIB = 1 << 20
WAY = granted_ways()[-1]


def test_the_device_beneath_the_origin(daemon: OwnDaemon, folder: Path) -> None:
    with (
        daemon.client() as client,
        loop_device(folder / "disk", 16 * MIB) as lower,
        loop_device(Path(lower)) as origin,
        filtered(client, origin, WAY, folder) as disk,
    ):
        write_at(disk.path, 0, b"o" * MIB)
        with pytest.raises(Busy, match=f"{lower}: {origin} rests on it"):
            client.create_snapshot([disk.path], storage=[lower])
        assert read_at(disk.path, 0, MIB) == b"o" * MIB
        assert client.list_snapshots() == []


def test_the_file_behind_the_origin(daemon: OwnDaemon, folder: Path) -> None:
    with (
        daemon.client() as client,
        loop_device(folder / "disk", 128 * MIB) as device,
        mounted(device, folder / "files") as point,
    ):
        image = point / "image"
        image.write_bytes(b"i" * 16 * MIB)
        with (
            loop_device(image) as origin,
            filtered(client, origin, WAY, folder) as disk,
            pytest.raises(Busy, match="is open elsewhere"),
        ):
            client.create_snapshot([disk.path], storage=[str(image)], limit=64 * MIB)
        assert image.read_bytes() == b"i" * 16 * MIB


def test_a_file_that_is_storage_is_no_origin(daemon: OwnDaemon, folder: Path) -> None:
    with (
        daemon.client() as client,
        loop_device(folder / "origin", 16 * MIB) as origin,
        loop_device(folder / "disk", 128 * MIB) as device,
        mounted(device, folder / "files") as point,
        filtered(client, origin, WAY, folder) as disk,
    ):
        image = point / "image"
        image.write_bytes(bytes(16 * MIB))
        snapshot = client.create_snapshot([disk.path], storage=[str(image)])
        with loop_device(image) as other, pytest.raises(Busy, match=f"holds the difference storage.*{snapshot.id}"):
            client.attach(other)
        client.destroy_snapshots([snapshot.id])


def test_a_device_behind_a_mounted_loop_device(daemon: OwnDaemon, folder: Path) -> None:
    with (
        daemon.client() as client,
        loop_device(folder / "origin", 16 * MIB) as origin,
        loop_device(folder / "disk", 64 * MIB) as lower,
        loop_device(Path(lower)) as upper,
        filtered(client, origin, WAY, folder) as disk,
    ):
        with mounted(upper, folder / "files") as point:
            (point / "precious").write_bytes(b"p" * MIB)
            with pytest.raises(Busy, match=f"{upper} rests on it"):
                client.create_snapshot([disk.path], storage=[lower])
        subprocess.run(["e2fsck", "-fn", upper], check=True, capture_output=True)


def test_a_file_system_whose_journal_lies_on_the_filtered_device(daemon: OwnDaemon, folder: Path) -> None:
    with (
        daemon.client() as client,
        loop_device(folder / "origin", 32 * MIB) as origin,
        loop_device(folder / "disk", 128 * MIB) as device,
        filtered(client, origin, WAY, folder) as disk,
    ):
        run("mke2fs", "-q", "-b", "4096", "-O", "journal_dev", disk.path)
        with (
            mounted(device, folder / "files", mkfs=("-b", "4096", "-J", f"device={disk.path}")) as point,
            pytest.raises(Unsupported, match=f"lies on {disk.path}"),
        ):
            client.create_snapshot([disk.path], storage=[str(point)], limit=64 * MIB)
