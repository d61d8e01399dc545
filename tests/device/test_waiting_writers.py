# SPDX-License-Identifier: MIT
"""Writers that wait for room in the difference storage, or for their turn: what goes on meanwhile, what ends the
waiting, and who may die during it."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError, Busy
from tests.direct_io import read_at, write_at
from tests.filtered import Filtered, filtered
from tests.fio_load import fio_load
from tests.loop_devices import loop_device
from tests.lost_storage import storage_state
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
UNIT = 4096
SIZE = 4 * MIB
WAITING = 2 * MIB
"""Where the writers that wait write."""


def storage_file(folder: Path, name: str, size: int) -> str:
    """A file of `size` bytes, as the SPEC of storage that does not grow."""
    (folder / name).write_bytes(bytes(size))
    return f"{folder / name}:0+{size // 512}"


@dataclass
class Waiting:
    """A filtered device, and a snapshot that pauses whose storage has been filled by overwriting the first MiB; four
    writers wait. `copy`: the device at the instant.
    """

    client: Client
    disk: Filtered
    copy: Path
    snapshot: forms.Snapshot
    data: list[bytes]
    writers: list[Future[None]]

    def still_wait(self) -> bool:
        return not any(writer.done() for writer in self.writers)

    def expect_written(self) -> None:
        """All writers have ended without an error, and the device has their data."""
        for writer in self.writers:
            writer.result(100)
        assert read_at(self.disk.path, WAITING, len(self.data) * UNIT) == b"".join(self.data)

    def expect_right(self) -> None:
        """The snapshot is active and shows its instant."""
        assert self.disk.state_of(self.snapshot) == "active", self.client.show_snapshot(self.snapshot.id).error
        self.disk.expect_equal(self.snapshot.images[0].image, self.copy)


@contextmanager
def waiting(client: Client, folder: Path, way: str) -> Iterator[Waiting]:
    with (
        loop_device(folder / "origin", SIZE) as origin,
        filtered(client, origin, way, folder, detach=False) as disk,
        ThreadPoolExecutor(4) as pool,
    ):
        write_at(disk.path, 0, os.urandom(SIZE))
        copy = disk.copy()
        storage = storage_file(folder, "storage", MIB)
        snapshot = client.create_snapshot([disk.path], storage=[storage], on_overflow="pause:600")
        write_at(disk.path, 0, os.urandom(MIB))
        data = [os.urandom(UNIT) for _ in range(4)]
        try:
            writers = [pool.submit(write_at, disk.path, WAITING + n * UNIT, each) for n, each in enumerate(data)]
            wait_until("they wait", lambda: "storage-waiting" in _types(client, snapshot))
            story = Waiting(client, disk, copy, snapshot, data, writers)
            assert story.still_wait()
            yield story
        finally:
            for held in client.list_snapshots():
                client.destroy_snapshots([held.id], force=True)
        client.detach(disk.path)


def _types(client: Client, snapshot: forms.Snapshot) -> list[str]:
    return [event.type for event in client.events(snapshot=snapshot.id)]


def test_they_keep_nobody_else_from_the_device(client: Client, folder: Path, way: str) -> None:
    """Reads, writes that need no room; a snapshot is refused, and taken when there is room again."""
    with waiting(client, folder, way) as story:
        disk = story.disk
        write_at(disk.path, 0, os.urandom(MIB))
        assert read_at(disk.path, WAITING, UNIT) == story.copy.read_bytes()[WAITING : WAITING + UNIT]
        story.expect_right()
        with pytest.raises(Busy):
            disk.snapshot(folder)
        assert [each.id for each in client.list_snapshots()] == [story.snapshot.id]
        assert story.still_wait()
        client.add_storage(story.snapshot.id, [storage_file(folder, "more", MIB)])
        story.expect_written()
        story.expect_right()
        disk.destroy(disk.snapshot(folder))


@pytest.mark.parametrize("force", [False, True])
def test_the_snapshot_can_be_destroyed(client: Client, folder: Path, way: str, force: bool) -> None:
    with waiting(client, folder, way) as story:
        client.destroy_snapshots([story.snapshot.id], force=force)
        story.expect_written()


def test_the_device_is_detached_by_force(client: Client, folder: Path, way: str) -> None:
    """It says whom it breaks; the writers end, with an error or without, and the origin is free afterwards."""
    with (
        loop_device(folder / "origin", SIZE) as origin,
        filtered(client, origin, way, folder, detach=False) as disk,
        ThreadPoolExecutor(1) as pool,
    ):
        write_at(disk.path, 0, os.urandom(SIZE))
        storage = storage_file(folder, "storage", MIB)
        snapshot = client.create_snapshot([disk.path], storage=[storage], on_overflow="pause:600")
        write_at(disk.path, 0, os.urandom(MIB))
        writer = pool.submit(write_at, disk.path, WAITING, os.urandom(UNIT))
        wait_until("it waits", lambda: "storage-waiting" in _types(client, snapshot))
        detached = client.detach(disk.path, force=True)
        assert detached.broken_snapshots == [snapshot.id]
        assert writer.exception(100) is None or isinstance(writer.exception(), OSError)
        os.close(os.open(origin, os.O_RDWR | os.O_EXCL))
        assert client.list_snapshots() == []


def test_control_is_killed(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    """They go on waiting, and go on when its successor gets room."""
    with waiting(client, folder, way) as story:
        former = daemon.pid("control")
        os.kill(former, signal.SIGKILL)
        wait_until("another control process", lambda: daemon.replaced("control", former))
        wait_until("it answers", lambda: _answers(daemon))
        assert story.still_wait()
        client.add_storage(story.snapshot.id, [storage_file(folder, "more", MIB)])
        story.expect_written()
        story.expect_right()


def test_the_io_process_is_killed(folder: Path, way: str) -> None:
    """Its successor gets their requests again: they go on waiting, and end when there is room."""
    with own_daemon() as daemon, daemon.client() as client, waiting(client, folder, way) as story:
        former = daemon.pid("io")
        os.kill(former, signal.SIGKILL)
        wait_until("another io process", lambda: daemon.replaced("io", former))
        wait_until("its device is served again", lambda: "recovered" in [event.type for event in client.events()])
        assert story.still_wait()
        client.add_storage(story.snapshot.id, [storage_file(folder, "more", MIB)])
        story.expect_written()
        story.expect_right()


def _answers(daemon: OwnDaemon) -> bool:
    try:
        with daemon.client() as another:
            another.list_devices()
    except BlksnapError:
        return False
    return True


def test_the_daemon_is_stopped(folder: Path) -> None:
    """They end without an error, when it ends or when it is there again."""
    with (
        loop_device(folder / "origin", SIZE) as origin,
        own_daemon() as daemon,
        daemon.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        device = client.attach(origin).device
        write_at(device, 0, os.urandom(SIZE))
        storage = storage_file(folder, "storage", MIB)
        snapshot = client.create_snapshot([device], storage=[storage], on_overflow="pause:600")
        write_at(device, 0, os.urandom(MIB))
        data = os.urandom(UNIT)
        writer = pool.submit(write_at, device, WAITING, data)
        wait_until("it waits", lambda: "storage-waiting" in _types(client, snapshot))
        daemon.end()
        daemon.start()
        writer.result(100)
        assert read_at(origin, WAITING, UNIT) == data


def test_an_image_that_is_read_is_evicted_all_the_same(client: Client, folder: Path, way: str) -> None:
    """Nothing more is read from it; the newer snapshot stays and is right."""
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        write_at(disk.path, 0, os.urandom(SIZE))
        storage = storage_file(folder, "storage", MIB)
        older = client.create_snapshot([disk.path], storage=[storage], on_overflow="evict-oldest")
        write_at(disk.path, 0, os.urandom(MIB // 2))
        copy = disk.copy()
        newer = client.create_snapshot([disk.path], storage=[f"@{older.id}"])
        image = os.open(older.images[0].image, os.O_RDONLY | os.O_DIRECT)
        try:
            write_at(disk.path, WAITING, os.urandom(MIB - UNIT))
            wait_until("it is evicted", lambda: [each.id for each in client.list_snapshots()] == [newer.id])
            assert _read_or_nothing(image) == 0
        finally:
            os.close(image)
        assert disk.state_of(newer) == "active"
        disk.expect_equal(newer.images[0].image, copy)


def _read_or_nothing(image: int) -> int:
    """How many of the first bytes can be read: a disk that is gone gives an error, or is empty."""
    with mmap.mmap(-1, UNIT) as buffer:
        try:
            return os.preadv(image, [buffer], 0)
        except OSError:
            return 0


# Their turn


def test_copies_that_are_slowed_down_lose_nothing(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    """A snapshot that is taken meanwhile is taken or refused; what is destroyed keeps nobody waiting."""
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        write_at(disk.path, 0, os.urandom(SIZE))
        before = storage_state(daemon)
        copy = disk.copy()
        slow = client.create_snapshot([disk.path], storage=[str(folder)], limit=2 * SIZE, copy_rate=MIB)
        with fio_load(disk.path, size=f"{SIZE}") as load:
            wait_until("some of it is preserved", lambda: _preserved(client, slow) > 64 << 10)
            try:
                client.destroy_snapshots([disk.snapshot(folder).id])
            except Busy:
                assert [each.id for each in client.list_snapshots()] == [slow.id]
            disk.expect_equal(slow.images[0].image, copy)
            if _preserved(client, slow) < SIZE:
                client.throttle_storage(slow.id, None)
            load.wait_for_round()
            disk.expect_equal(slow.images[0].image, copy)
            assert disk.state_of(slow) == "active"
            disk.destroy(slow)
            slower = client.create_snapshot([disk.path], storage=[str(folder)], limit=2 * SIZE, copy_rate=MIB)
            wait_until("some of it is preserved", lambda: _preserved(client, slower) > 64 << 10)
            disk.destroy(slower)
            load.wait_for_round()
        assert storage_state(daemon) == before


def _preserved(client: Client, snapshot: forms.Snapshot) -> int:
    return client.show_snapshot(snapshot.id).images[0].preserved_bytes
