# SPDX-License-Identifier: MIT
"""Names that lead to our devices, and the partitions that the kernel shows on them, where no udev runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.host import blockdev
from blksnap_ublk.snapshot.role import Role
from blksnap_ublk.ublk import helper
from tests.own_daemon import Disks, OwnDaemon, disks, wait_until
from tests.partitions import make_partitions, partitions_of

BASE = Path("/dev/blksnap")
MIB = 1 << 20


def _links() -> dict[str, str]:
    """All links below /dev/blksnap, and where they lead."""
    return {str(path.relative_to(BASE)): str(path.resolve()) for path in BASE.rglob("*") if path.is_symlink()}


@pytest.fixture
def two() -> Iterator[Disks]:
    with disks(48 * MIB) as made:
        yield made


def _snapshot(client: Client, device: str, two: Disks, *, partitions: bool = False) -> tuple[str, str]:
    """The id of a snapshot, and its image."""
    taken = client.create_snapshot([device], storage=[str(two.directory)], limit=64 * MIB, partitions=partitions)
    return taken.id, taken.images[0].image


@pytest.mark.quick
def test_links_are_there_when_a_command_returns_and_gone_when_their_device_is(client: Client, two: Disks) -> None:
    assert not BASE.exists()
    device = client.attach(two.origin, name="data").device
    served = {"data": device, "origins/data": two.origin}
    assert _links() == served
    snapshot, image = _snapshot(client, device, two)
    assert _links() == served | {f"{snapshot}/data": image}
    assert client.changes("/dev/blksnap/data", since=None).device == device
    client.destroy_snapshots([snapshot])
    assert _links() == served
    client.detach("/dev/blksnap/origins/data")
    assert not BASE.exists()


def test_an_attach_that_fails_leaves_no_link(client: Client, two: Disks) -> None:
    client.attach(two.origin, name="data")
    before = _links()
    with pytest.raises(Exception, match="taken"):
        client.attach(two.other, name="data")
    with pytest.raises(Exception, match="directory"):
        client.attach(two.other, name="origins")
    assert _links() == before
    client.detach("data")


def test_after_a_kill_stale_links_go_and_missing_ones_return(daemon: OwnDaemon, client: Client, two: Disks) -> None:
    device = client.attach(two.origin, name="data").device
    snapshot, image = _snapshot(client, device, two)
    before = _links()
    (BASE / "data").unlink()
    (BASE / snapshot / "data").unlink()
    (daemon.runtime / "udev" / Path(image).name).unlink()
    (BASE / "former").symlink_to("../ublkb999")
    (daemon.runtime / "udev/ublkb999").write_text(Role.of_filtered("former", "/dev/sdz").encode())
    killed = daemon.pid("control")
    os.kill(killed, signal.SIGKILL)
    wait_until("control is there again", lambda: daemon.replaced("control", killed))
    with daemon.client() as again:
        again.list_devices()
        assert _links() == before
        assert not (daemon.runtime / "udev/ublkb999").exists()
        again.destroy_snapshots([snapshot])
        again.detach(device)
    assert not BASE.exists()
    assert not os.listdir(daemon.runtime / "udev")


@pytest.mark.quick
def test_partitions_are_shown_on_filtered_devices_and_on_images_only_when_asked(client: Client, two: Disks) -> None:
    make_partitions(two.origin)
    device = client.attach(two.origin, name="data").device
    assert partitions_of(device) == [f"{device}p1", f"{device}p2"]
    assert _links()["data-part2"] == f"{device}p2"
    assert blockdev.describe(f"{device}p1").size == 8 * MIB

    plain, image = _snapshot(client, device, two)
    assert partitions_of(image) == []
    client.destroy_snapshots([plain])

    shown, image = _snapshot(client, device, two, partitions=True)
    assert partitions_of(image) == [f"{image}p1", f"{image}p2"]
    assert _links()[f"{shown}/data-part1"] == f"{image}p1"
    # What is done where the kernel has looked for them unasked.
    number = blockdev.describe(image).ublk_id
    assert number is not None
    helper.hide_partitions(number, timeout=10)
    assert partitions_of(image) == []
    client.destroy_snapshots([shown])
    client.detach(device)
    assert not BASE.exists()
