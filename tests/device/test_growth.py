# SPDX-License-Identifier: MIT
"""Difference storage that grows by itself, by its user, or makes room, under writes that are verified."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError, Failed, Unsupported, UsageError
from tests.device.test_killed_control import PROGRAM, answers, drawn, each_step, killed
from tests.direct_io import write_at
from tests.filtered import Filtered, filtered, granted_ways
from tests.fio import fio_verify
from tests.fio_load import fio_load
from tests.loop_devices import loop_device, mounted, run
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
SIZE = 128 * MIB
START = 4 * MIB
ROOM = 320 * MIB
WAY = granted_ways()[-1]


@pytest.fixture
def disk(client: Client, folder: Path) -> Iterator[Filtered]:
    """A filtered device full of data that does not repeat."""
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, WAY, folder) as found:
        fill(found.path)
        yield found


@contextmanager
def tmpfs(place: Path, size: int) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place))
    try:
        yield place
    finally:
        run("umount", str(place))


@contextmanager
def file_system(kind: str, folder: Path) -> Iterator[Path]:
    """A fresh one with some room."""
    if kind == "tmpfs":
        with tmpfs(folder / "storage", ROOM) as place:
            yield place
        return
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"no mkfs.{kind}")
    with loop_device(folder / "storage.img", ROOM) as device, mounted(device, folder / "storage", kind) as place:
        yield place


def fill(path: str, start: int = 0, length: int = SIZE) -> None:
    for at in range(start, start + length, MIB):
        write_at(path, at, os.urandom(MIB))


def file_of(place: Path, size: int = START) -> Path:
    path = place / "difference"
    path.write_bytes(bytes(size))
    return path


def take(
    disk: Filtered, storage: Path | str, *, limit: int | None = None, on_overflow: str | None = None
) -> forms.Snapshot:
    return disk.client.create_snapshot(
        [disk.path], storage=[str(storage)], limit=limit, on_overflow=on_overflow, freeze=forms.Freeze.NO
    )


def capacity(client: Client, snapshot: forms.Snapshot) -> int:
    return client.show_snapshot(snapshot.id).storage.capacity


def events(client: Client, snapshot: forms.Snapshot) -> list[forms.Event]:
    return list(client.events(snapshot=snapshot.id))


def told(client: Client, snapshot: forms.Snapshot, kind: str) -> bool:
    return any(event.type == kind for event in events(client, snapshot))


def expect_right(disk: Filtered, snapshot: forms.Snapshot, copy: Path) -> None:
    """It is active, and shows its instant."""
    shown = disk.client.show_snapshot(snapshot.id)
    assert shown.state is forms.SnapshotState.ACTIVE, shown.error
    disk.expect_equal(snapshot.images[0].image, copy)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs"])
def test_a_small_file_grows_ahead_of_writers(disk: Filtered, folder: Path, kind: str) -> None:
    with file_system(kind, folder) as place:
        copy = disk.copy()
        storage = file_of(place)
        snapshot = take(disk, storage, limit=256 * MIB)
        assert snapshot.storage.capacity == START
        fio_verify(disk.path, "--randrepeat=0", size="96m")
        expect_right(disk, snapshot, copy)
        grown = [event for event in events(disk.client, snapshot) if event.type == "storage-grown"]
        now = disk.client.show_snapshot(snapshot.id).storage
        assert now.capacity == START + sum(int(event.data["bytes"]) for event in grown) <= 256 * MIB
        assert now.used <= now.capacity == storage.stat().st_size
        assert storage.stat().st_mode & 0o777 == 0o600
        disk.destroy(snapshot)
        assert storage.stat().st_size == START


def test_a_directory_begins_with_a_part_and_has_more_when_it_is_needed(client: Client, folder: Path) -> None:
    size = 400 * MIB
    with (
        loop_device(folder / "origin", size) as origin,
        filtered(client, origin, WAY, folder) as disk,
        tmpfs(folder / "storage", 500 * MIB) as place,
    ):
        snapshot = take(disk, place, limit=size)
        assert snapshot.storage.capacity == 256 * MIB
        fill(disk.path, 0, size)
        assert disk.state_of(snapshot) == "active"
        assert capacity(client, snapshot) <= size
        disk.destroy(snapshot)
        assert list(place.iterdir()) == []
        assert os.statvfs(place).f_bfree == os.statvfs(place).f_blocks


def test_at_its_limit_a_snapshot_is_lost_and_nobody_waits(disk: Filtered, folder: Path) -> None:
    storage = file_of(folder)
    snapshot = take(disk, storage, limit=16 * MIB)
    fio_verify(disk.path, size="64m")
    wait_until("it is told", lambda: told(disk.client, snapshot, "overflow"))
    shown = disk.client.show_snapshot(snapshot.id)
    assert shown.state is forms.SnapshotState.OVERFLOWN
    assert shown.storage.capacity == 16 * MIB
    with pytest.raises(Failed, match="overflown"):
        disk.client.add_storage(snapshot.id, storage=[str(folder)])
    with pytest.raises(Failed, match="overflown"):
        disk.client.limit_storage(snapshot.id, 32 * MIB)
    disk.destroy(snapshot)
    assert storage.stat().st_size == START


def test_growth_that_fails_is_told_and_goes_on_when_there_is_room(disk: Filtered, folder: Path) -> None:
    """On a full tmpfs, while writers wait."""
    copy = disk.copy()
    with tmpfs(folder / "storage", 24 * MIB) as place:
        storage = file_of(place)
        (place / "filler").write_bytes(bytes(18 * MIB))
        snapshot = take(disk, storage, limit=256 * MIB, on_overflow="pause:300")
        with fio_load(disk.path, size="48m") as load:
            wait_until("writers wait", lambda: told(disk.client, snapshot, "storage-waiting"))
            assert told(disk.client, snapshot, "storage-grow-failed")
            run("mount", "-o", f"remount,size={ROOM}", str(place))
            load.wait_for_round()
        wait_until("it is told", lambda: told(disk.client, snapshot, "storage-resumed"))
        expect_right(disk, snapshot, copy)
        disk.destroy(snapshot)
        assert storage.stat().st_size == START


def test_storage_is_added_under_load_before_and_after_warnings(disk: Filtered, folder: Path) -> None:
    copy = disk.copy()
    with file_system("ext4", folder) as place, loop_device(folder / "more", 96 * MIB) as device:
        storage = file_of(place, 32 * MIB)
        snapshot = take(disk, f"{storage}:8+16384", on_overflow="pause:300")
        assert snapshot.storage.capacity == 8 * MIB
        with fio_load(disk.path, size="96m") as load:
            added = disk.client.add_storage(snapshot.id, storage=[f"{storage}:16392+8192,24584+8184"])
            assert added.capacity == 8 * MIB + 4 * MIB + 8184 * 512
            wait_until("it is low", lambda: told(disk.client, snapshot, "storage-low"))
            wait_until("writers wait", lambda: told(disk.client, snapshot, "storage-waiting"))
            added = disk.client.add_storage(snapshot.id, storage=[device])
            assert added.capacity == 12 * MIB + 8184 * 512 + 96 * MIB
            load.wait_for_round()
        expect_right(disk, snapshot, copy)
        low = [event.data for event in events(disk.client, snapshot) if event.type == "storage-low"]
        assert [each["percent"] for each in low][:3] == [80, 90, 95]
        disk.destroy(snapshot)
        assert storage.stat().st_size == 32 * MIB


def test_what_is_added_grows_and_is_given_back(disk: Filtered, folder: Path) -> None:
    copy = disk.copy()
    with file_system("xfs", folder) as place:
        snapshot = take(disk, f"{file_of(folder)}:0+8192", limit=8 * MIB)
        with pytest.raises(UsageError):
            disk.client.add_storage(snapshot.id, storage=[str(folder / "nowhere" / "file")])
        with pytest.raises(BlksnapError, match="hold the storage of another"):
            disk.client.add_storage(snapshot.id, storage=[f"{folder / 'difference'}:8+8"])
        with pytest.raises(Unsupported):
            disk.client.add_storage(snapshot.id, storage=[disk.path])
        assert capacity(disk.client, snapshot) == 4 * MIB
        disk.client.add_storage(snapshot.id, storage=[str(place)])
        assert capacity(disk.client, snapshot) == 8 * MIB
        limited = disk.client.limit_storage(snapshot.id, 200 * MIB)
        assert limited.limit == 200 * MIB
        fio_verify(disk.path, size="64m")
        expect_right(disk, snapshot, copy)
        assert 8 * MIB < capacity(disk.client, snapshot) <= 200 * MIB
        before = capacity(disk.client, snapshot)
        assert disk.client.limit_storage(snapshot.id, MIB).capacity >= before
        disk.destroy(snapshot)


def test_a_pause_ends_when_the_limit_is_raised(disk: Filtered, folder: Path) -> None:
    copy = disk.copy()
    snapshot = take(disk, file_of(folder), limit=8 * MIB, on_overflow="pause:300")
    with fio_load(disk.path, size="64m") as load:
        wait_until("writers wait", lambda: told(disk.client, snapshot, "storage-waiting"))
        disk.client.limit_storage(snapshot.id, 160 * MIB)
        load.wait_for_round()
    expect_right(disk, snapshot, copy)
    disk.destroy(snapshot)


def test_a_pause_in_which_nobody_makes_room_ends_with_the_snapshot(disk: Filtered, folder: Path) -> None:
    snapshot = take(disk, file_of(folder), limit=8 * MIB, on_overflow="pause:2")
    fio_verify(disk.path, size="32m")
    wait_until("it is told", lambda: told(disk.client, snapshot, "overflow"))
    assert told(disk.client, snapshot, "storage-waiting")
    disk.destroy(snapshot)


def test_older_snapshots_are_evicted_for_the_newest(disk: Filtered, folder: Path) -> None:
    """Each round of writes needs as many places as there are left when all older snapshots have gone."""
    first = take(disk, file_of(folder, 40 * MIB), limit=40 * MIB, on_overflow="evict-oldest")
    taken = [first]
    for _ in range(3):
        fill(disk.path, 0, 12 * MIB)
        copy = disk.copy()
        taken.append(take(disk, f"@{taken[-1].id}"))
    fill(disk.path, 0, 32 * MIB)
    newest = taken[-1]
    expect_right(disk, newest, copy)
    evicted = [event.snapshot for event in disk.client.events() if event.type == "evicted"]
    gone = [snapshot.id for snapshot in taken if snapshot.id in evicted]
    assert gone
    assert gone == [snapshot.id for snapshot in taken][: len(gone)] == evicted[-len(gone) :]
    wait_until("they are gone", lambda: not {each.id for each in disk.client.list_snapshots()} & set(gone))
    disk.destroy(newest)


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_control_is_killed_while_storage_grows(folder: Path, kind: str) -> None:
    with loop_device(folder / "origin", SIZE) as origin, file_system(kind, folder) as place, own_daemon() as daemon:
        with daemon.client() as client:
            path = client.attach(origin).device
            fill(path)
            disk = Filtered(client, path, origin, SIZE, folder)
            copy = disk.copy()
            storage = file_of(place)
            snapshot = take(disk, storage, limit=200 * MIB, on_overflow="pause:300")
        with fio_load(path, "--rate=,32m", size="64m") as load:
            for _ in range(4):
                former = storage.stat().st_size
                wait_until("it has grown", lambda: storage.stat().st_size > former or load.rounds > 0)  # noqa: B023
                kill_control(daemon)
            load.wait_for_round()
        with daemon.client() as client:
            disk = Filtered(client, path, origin, SIZE, folder)
            expect_right(disk, snapshot, copy)
            assert START < capacity(client, snapshot) <= storage.stat().st_size
            disk.destroy(snapshot)
            assert storage.stat().st_size == START
            client.detach(path)


@settings(parent=drawn)
@given(step=st.integers(1, 24))
def test_control_is_killed_while_storage_is_added(folder: Path, step: int) -> None:
    """A file that is made longer, a range, and an unnamed file: all of it is there afterwards, or a part that works."""
    each_step(step, lambda step: killed_while_added(folder, step))


def killed_while_added(folder: Path, step: int) -> bool:
    """Whether it has that step."""
    with (
        loop_device(folder / "origin", SIZE) as origin,
        tmpfs(folder / "storage", ROOM) as place,
        own_daemon([str(PROGRAM)]) as daemon,
    ):
        with daemon.client() as client:
            path = client.attach(origin).device
            fill(path, 0, 32 * MIB)
            disk = Filtered(client, path, origin, SIZE, folder)
            copy = disk.copy()
            snapshot = take(disk, f"{file_of(folder)}:0+8192", limit=96 * MIB, on_overflow="pause:300")
        (place / "empty").write_bytes(b"")
        (place / "range").write_bytes(bytes(2 * MIB))
        added = [str(place), str(place / "empty"), f"{place / 'range'}:8+1024"]
        died = killed(daemon, step, lambda client: client.add_storage(snapshot.id, storage=added))
        with daemon.client() as client:
            disk = Filtered(client, path, origin, SIZE, folder)
            there = client.show_storage(snapshot.id)
            names = [area.path for area in there.areas]
            if len(names) == 1:
                wait_until("what was begun is taken back", lambda: (place / "empty").stat().st_size == 0)
                client.add_storage(snapshot.id, storage=added)
            else:
                assert names[1:] == [str(place), str(place / "empty"), str(place / "range")][: len(names) - 1]
            fill(path, 0, 32 * MIB)
            expect_right(disk, snapshot, copy)
            disk.destroy(snapshot)
            client.detach(path)
        sizes = {entry.name: entry.stat().st_size for entry in place.iterdir()}
        assert sizes == {"empty": 0, "range": 2 * MIB}
        assert (os.statvfs(place).f_blocks - os.statvfs(place).f_bfree) * os.statvfs(place).f_frsize <= 3 * MIB
    return died


def test_the_io_process_dies_after_growth(folder: Path) -> None:
    with loop_device(folder / "origin", SIZE) as origin, own_daemon() as daemon, daemon.client() as client:
        path = client.attach(origin).device
        storage = file_of(folder)
        disk = Filtered(client, path, origin, SIZE, folder)
        before = disk.copy("before")
        snapshot = take(disk, storage, limit=200 * MIB)
        fill(path, 0, 32 * MIB)
        assert storage.stat().st_size > START
        os.kill(daemon.pid("io"), signal.SIGKILL)
        fill(path, 0, 48 * MIB)
        wait_until("it is served again", lambda: client.list_devices()[0].state is forms.DeviceState.LIVE)
        second = take(disk, folder, limit=200 * MIB)
        copy = disk.copy()
        fill(path, 0, 64 * MIB)
        expect_right(disk, second, copy)
        expect_right(disk, snapshot, before)
        client.destroy_snapshots([snapshot.id, second.id])
        assert storage.stat().st_size == START
        client.detach(path)


def kill_control(daemon: OwnDaemon) -> None:
    control = daemon.pid("control")
    os.kill(control, signal.SIGKILL)
    wait_until("another control process", lambda: daemon.replaced("control", control))
    wait_until("it answers", lambda: answers(daemon))


Harm = Callable[[Path], object]


def truncate(path: Path) -> None:
    os.truncate(path, MIB)


def punch(path: Path) -> None:
    run("fallocate", "--punch-hole", "--offset", "0", "--length", str(2 * MIB), str(path))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


@pytest.mark.parametrize(
    ("harm", "state"),
    [(truncate, "corrupted"), (punch, "corrupted"), (Path.unlink, "active"), (replace, "active")],
)
def test_what_happens_to_its_file_is_seen(disk: Filtered, folder: Path, harm: Harm, state: str) -> None:
    copy = disk.copy()
    with file_system("ext4", folder) as place:
        storage = file_of(place, 16 * MIB)
        snapshot = take(disk, storage, limit=16 * MIB)
        fill(disk.path, 0, 8 * MIB)
        harm(storage)
        wait_until("it is told", lambda: told(disk.client, snapshot, "storage-damaged"))
        wait_until("it counts", lambda: disk.state_of(snapshot) == state)
        fill(disk.path, 8 * MIB, 4 * MIB)
        assert disk.state_of(snapshot) == state
        if state == "active":
            expect_right(disk, snapshot, copy)
        assert len([event for event in events(disk.client, snapshot) if event.type == "storage-damaged"]) == 1
        disk.destroy(snapshot)
