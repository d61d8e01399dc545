# SPDX-License-Identifier: MIT
"""File systems of difference storage that do not answer: a device never waits for them, not even to be recovered."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.client.client import Client
from tests.filtered import Filtered, filtered, granted_ways
from tests.loop_devices import loop_device, mounted, run
from tests.own_daemon import OwnDaemon, wait_until

MIB = 1 << 20


@contextmanager
def _frozen(point: Path) -> Iterator[None]:
    run("fsfreeze", "-f", str(point))
    try:
        yield
    finally:
        run("fsfreeze", "-u", str(point))


@contextmanager
def _beside(daemon: OwnDaemon, call: Callable[[Client], object]) -> Iterator[Callable[[], None]]:
    """Begins `call` in a thread of its own when it is called; that has succeeded at the end of the `with`."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with daemon.client() as client:
                call(client)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    try:
        yield thread.start
    finally:
        thread.join()
    assert failed == []


def _refuse_waiting(path: str) -> None:
    """Reads in a process of its own: it may hang for ever."""
    command = ["dd", f"if={path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"]
    reading = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        assert reading.wait(120) == 0
    except subprocess.TimeoutExpired:
        pytest.fail("the filtered device waits for the storage")


@pytest.fixture
def parts(daemon: OwnDaemon, folder: Path) -> Iterator[tuple[Client, Filtered, Path]]:
    """A client, a filtered device, and a file system for storage."""
    with ExitStack() as stack:
        client = stack.enter_context(daemon.client())
        origin = stack.enter_context(loop_device(folder / "origin", 32 * MIB))
        device = stack.enter_context(loop_device(folder / "disk", 128 * MIB))
        point = stack.enter_context(mounted(device, folder / "files"))
        disk = stack.enter_context(filtered(client, origin, granted_ways()[-1], folder))
        yield client, disk, point


def _storages(daemon: OwnDaemon) -> list[str]:
    return [name for name in os.listdir(daemon.runtime / "state" / "catalogue") if name.startswith("storage-")]


def test_io_dies_while_a_snapshot_waits_for_its_storage(
    daemon: OwnDaemon, parts: tuple[Client, Filtered, Path]
) -> None:
    client, disk, point = parts

    def create(other: Client) -> object:
        return other.create_snapshot([disk.path], storage=[str(point)], limit=32 * MIB)

    with _beside(daemon, create) as begin, _frozen(point):
        begin()
        wait_until("its storage is being opened", lambda: bool(_storages(daemon)))
        os.kill(daemon.pid("io"), signal.SIGKILL)
        _refuse_waiting(disk.path)
    (snapshot,) = client.list_snapshots()
    disk.destroy(snapshot)
    assert _storages(daemon) == []


def test_io_dies_while_the_storage_of_a_snapshot_cannot_be_given_back(
    daemon: OwnDaemon, parts: tuple[Client, Filtered, Path]
) -> None:
    client, disk, point = parts
    path = point / "storage"
    path.write_bytes(bytes(MIB))
    snapshot = client.create_snapshot([disk.path], storage=[str(path), str(point)], limit=16 * MIB)
    run("sync", "-f", str(point))

    def destroy(other: Client) -> object:
        return other.destroy_snapshots([snapshot.id], force=True)

    with _beside(daemon, destroy) as begin, _frozen(point):
        begin()
        wait_until("the snapshot has gone", lambda: client.list_snapshots() == [])
        assert _storages(daemon) != []
        os.kill(daemon.pid("io"), signal.SIGKILL)
        _refuse_waiting(disk.path)
    wait_until("its storage has gone", lambda: _storages(daemon) == [])
    assert path.stat().st_size == MIB
