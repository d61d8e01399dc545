# SPDX-License-Identifier: MIT
"""What fails when the instant of a snapshot has come already is taken back, and no change is forgotten."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import Busy, Failed
from blksnap_ublk.forms import Snapshot
from blksnap_ublk.ublk.control import Control
from demo import blocks
from tests import failing_control
from tests.direct_io import write_at
from tests.filtered import Filtered, filtered, granted_ways
from tests.killing import answers, kill, kill_and_wait
from tests.loop_devices import loop_device
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
SIZE = 8 * MIB
UNIT = 4096
NO_SPACE = "No space left on device"


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon((failing_control.__file__,)) as running:
        yield running


@contextmanager
def two(client: Client, folder: Path) -> Iterator[list[Filtered]]:
    with ExitStack() as stack:
        found = []
        for name in ("a", "b"):
            (folder / name).mkdir()
            origin = stack.enter_context(loop_device(folder / name / "disk", SIZE))
            found.append(stack.enter_context(filtered(client, origin, granted_ways()[-1], folder / name)))
        yield found


def take(client: Client, devices: list[Filtered], folder: Path) -> Snapshot:
    return client.create_snapshot([device.path for device in devices], storage=[str(folder)], limit=3 * SIZE)


def write(devices: list[Filtered], unit: int) -> None:
    for device in devices:
        write_at(device.path, unit * 64 * UNIT, os.urandom(UNIT))


def cursors(snapshot: Snapshot) -> list[str]:
    return [image.cursor for image in snapshot.images]


def expect_all_changes(devices: list[Filtered], copies: list[Path], since: list[str], snapshot: Snapshot) -> None:
    for n, device in enumerate(devices):
        changes = device.client.changes(device.path, since=since[n], until=snapshot.id)
        assert not changes.all
        own = snapshot.images[n].image
        blocks.apply(own, [(int(start), int(length)) for start, length in changes.ranges], copies[n])
        device.expect_equal(own, copies[n])


@pytest.mark.parametrize("call", [1, 2])
def test_no_change_is_forgotten_when_a_history_cannot_be_written(
    daemon: OwnDaemon, client: Client, folder: Path, call: int
) -> None:
    """Writes are marked in the bitmaps of the next interval by then."""
    order = daemon.runtime / "fail"
    with two(client, folder) as devices:
        first = take(client, devices, folder)
        copies = [device.copy() for device in devices]
        write(devices, 1)
        order.write_text(f"commit {call}")
        try:
            with pytest.raises(Failed):
                take(client, devices, folder)
            write(devices, 2)
            with pytest.raises(Busy, match="taken back"):
                take(client, devices, folder)
            assert [each.id for each in client.list_snapshots()] == [first.id]
        finally:
            order.unlink()
        write(devices, 3)

        def try_to_take() -> bool:
            try:
                taken.append(take(client, devices, folder))
            except Busy:
                return False
            return True

        taken: list[Snapshot] = []
        wait_until("the failed one is taken back", try_to_take)
        expect_all_changes(devices, copies, cursors(first), taken[0])
        client.destroy_snapshots([first.id, taken[0].id])
        assert client.list_snapshots() == []


@pytest.mark.parametrize("call", [1, 2])
def test_images_that_cannot_be_started_are_taken_back(
    daemon: OwnDaemon, client: Client, folder: Path, call: int
) -> None:
    order = daemon.runtime / "fail"
    with two(client, folder) as devices:
        first = take(client, devices, folder)
        before = daemon.state()
        copies = [device.copy() for device in devices]
        write(devices, 1)
        order.write_text(f"start {call}")
        try:
            with pytest.raises(Failed):
                take(client, devices, folder)
        finally:
            order.unlink()
        assert [each.id for each in client.list_snapshots()] == [first.id]
        events = list(client.events(since=0))
        taken = {event.snapshot for event in events if event.type == "taken"}
        assert {event.snapshot for event in events if event.type == "destroyed"} <= taken, "nobody knows that one"
        write(devices, 2)
        second = take(client, devices, folder)
        expect_all_changes(devices, copies, cursors(first), second)
        client.destroy_snapshots([second.id])
        assert {name for name in daemon.state() if "device" not in name} == {n for n in before if "device" not in n}
        client.destroy_snapshots([first.id])


def test_images_that_cannot_be_served_again_at_once_are_tried_again(
    daemon: OwnDaemon, client: Client, folder: Path
) -> None:
    """The device's own recovery is the first call. What fails then may be over in a moment, and is no loss."""
    order = daemon.runtime / "fail"
    with (
        loop_device(folder / "disk", SIZE) as origin,
        filtered(client, origin, granted_ways()[-1], folder) as device,
    ):
        for unit in (1, 2):
            write([device], unit)
        snapshot = device.snapshot(folder)
        image = snapshot.images[0].image
        before = blocks.sha256(image, SIZE)
        write([device], 1)
        order.write_text("end_recovery 2")
        try:
            kill_and_wait(daemon, "io")
            wait_until("it was tried", lambda: "cannot be served again yet" in daemon.log())
        finally:
            order.unlink()
        assert blocks.sha256(image, SIZE) == before
        assert device.state_of(snapshot) == "active"
        device.destroy(snapshot)


def test_images_are_served_while_the_control_process_cannot_have_their_storage(
    daemon: OwnDaemon, client: Client, folder: Path
) -> None:
    order = daemon.runtime / "fail"
    with (
        loop_device(folder / "disk", SIZE) as origin,
        filtered(client, origin, granted_ways()[-1], folder) as device,
    ):
        for unit in (1, 2):
            write([device], unit)
        snapshot = device.snapshot(folder)
        image = snapshot.images[0].image
        before = blocks.sha256(image, SIZE)
        write([device], 1)
        order.write_text("adopt 1")
        try:
            kill_and_wait(daemon, "io", "control")
            assert blocks.sha256(image, SIZE) == before
        finally:
            order.unlink()
    with daemon.client() as after:
        assert after.list_snapshots() == []


def test_a_recovery_that_fails_as_a_whole_is_done_again(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    order = daemon.runtime / "fail"
    with (
        loop_device(folder / "disk", SIZE) as origin,
        filtered(client, origin, granted_ways()[-1], folder) as device,
    ):
        for unit in (1, 2):
            write([device], unit)
        snapshot = device.snapshot(folder)
        image = snapshot.images[0].image
        before = blocks.sha256(image, SIZE)
        write([device], 1)
        failures = daemon.log().count(NO_SPACE)
        order.write_text("tell_unstored 1")
        try:
            kill(daemon, "io")
            wait_until("it has failed again", lambda: daemon.log().count(NO_SPACE) > failures + 1)
        finally:
            order.unlink()
        wait_until("the device is served", lambda: answers(daemon))
        assert blocks.sha256(image, SIZE) == before
        write([device], 2)
        assert blocks.sha256(image, SIZE) == before
        assert device.state_of(snapshot) == "active"


def test_no_change_is_forgotten_because_a_device_is_refused(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    order = daemon.runtime / "fail"
    with (
        loop_device(folder / "disk", SIZE) as origin,
        filtered(client, origin, granted_ways()[-1], folder) as device,
    ):
        first = device.snapshot(folder)
        copy = device.copy()
        device.destroy(first)
        write([device], 1)
        order.write_text("open_at_io 1")
        try:
            kill(daemon, "io")
            wait_until("it was refused", lambda: "cannot be served again" in daemon.log())
        finally:
            order.unlink()
        wait_until("the device is served", lambda: answers(daemon))
        write([device], 2)
        device.expect_increment(copy, first.images[0].cursor, device.snapshot(folder))


def test_an_image_that_somebody_else_has_removed_can_be_destroyed(
    daemon: OwnDaemon, client: Client, folder: Path
) -> None:
    with two(client, folder) as devices:
        before = daemon.state()
        snapshot = take(client, devices, folder)
        number = int(snapshot.images[0].image.removeprefix("/dev/ublkb"))
        with Control() as control:
            control.stop(number)
            control.delete(number, wait=False)
        client.destroy_snapshots([snapshot.id])
        assert client.list_snapshots() == []
        assert {name.partition(".")[0] for name in daemon.state()} == {name.partition(".")[0] for name in before}
        assert not (daemon.runtime / "udev" / f"ublkb{number}").exists()
        assert not Path("/dev/blksnap", snapshot.id).exists()
