# SPDX-License-Identifier: MIT
"""Snapshots that end by themselves: by time, with their process, after a kill -9 of control, and while in use."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError, NotFound, UsageError
from blksnap_ublk.forms import Snapshot
from tests.direct_io import errno_of_read, read_at, write_at
from tests.loop_devices import loop_device, run
from tests.own_daemon import OwnDaemon, own_daemon, ublk_nodes, wait_until

SIZE = 32 << 20
LIMIT = 4 << 20
LONG = 3600.0
UNIT = 4096


@dataclass
class Two:
    """Two filtered devices, and a directory for difference storage."""

    first: str
    second: str
    directory: Path


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon() as running:
        yield running


@pytest.fixture
def two(daemon: OwnDaemon, folder: Path) -> Iterator[Two]:
    with loop_device(folder / "first", SIZE) as first, loop_device(folder / "second", SIZE) as second:
        with daemon.client() as client:
            made = Two(client.attach(first).device, client.attach(second).device, folder)
        nodes, state = ublk_nodes(), daemon.state()
        try:
            yield made
            assert ublk_nodes() == nodes, daemon.log()
            wait_until("the storage was given back", lambda: daemon.state() == state)
        finally:
            with daemon.client() as client:
                for snapshot in client.list_snapshots():
                    client.destroy_snapshots([snapshot.id], force=True)
                for device in client.list_devices():
                    client.detach(device.device, force=True)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that goes on until somebody ends it."""
    started = subprocess.Popen(["sleep", "100000"])
    yield started
    started.kill()
    started.wait()


def take(client: Client, two: Two, device: str, *, ttl: float | None = None, while_pid: int | None = None) -> Snapshot:
    return client.create_snapshot([device], storage=[str(two.directory)], limit=LIMIT, ttl=ttl, while_pid=while_pid)


def ids(client: Client) -> set[str]:
    return {snapshot.id for snapshot in client.list_snapshots()}


def wait_for_end(client: Client, snapshot: Snapshot) -> None:
    wait_until(f"snapshot {snapshot.id} has ended", lambda: snapshot.id not in ids(client))


def kinds(client: Client, snapshot: Snapshot) -> list[str]:
    return [event.type for event in client.events(since=0) if event.snapshot == snapshot.id]


def wait_for_events(client: Client, snapshot: Snapshot, *expected: str) -> None:
    """The last event follows what it tells of."""
    wait_until(f"the event {expected[-1]}", lambda: expected[-1] in kinds(client, snapshot))
    assert kinds(client, snapshot) == list(expected)


def kill_control(daemon: OwnDaemon) -> None:
    """Returns when another one answers."""
    before = daemon.pid("control")
    os.kill(before, signal.SIGKILL)
    wait_until("another control process", lambda: daemon.replaced("control", before))

    def answers() -> bool:
        with suppress(BlksnapError), daemon.client() as client:
            client.list_devices()
            return True
        return False

    wait_until("it answers", answers)


@pytest.mark.quick
def test_time_ends_it(client: Client, two: Two) -> None:
    lasting = take(client, two, two.first, ttl=LONG)
    assert (lasting.ttl, lasting.while_pid) == (LONG, None)
    assert lasting.expires is not None
    assert lasting.expires > lasting.created
    short = take(client, two, two.second, ttl=1)
    write_at(two.second, 0, os.urandom(UNIT))
    wait_for_end(client, short)
    wait_for_events(client, short, "taken", "expired", "destroyed")
    assert ids(client) == {lasting.id}
    with pytest.raises(NotFound):
        client.renew_snapshot(short.id)
    assert client.check_snapshot(lasting.id).trusted
    client.destroy_snapshots([lasting.id])


def test_what_it_leaves_is_for_the_next_one_at_once(client: Client, two: Two) -> None:
    """Its storage file is given back a moment after its end; who wants it meanwhile waits."""
    storage = two.directory / "storage"
    storage.write_bytes(bytes(LIMIT))
    for _ in range(3):
        short = client.create_snapshot([two.first], storage=[str(storage)], ttl=0.5)
        while short.id in ids(client):
            pass
    last = client.create_snapshot([two.second], storage=[str(two.directory)], limit=LIMIT)
    short = client.create_snapshot([two.first], storage=[str(storage)], ttl=0.5)
    while short.id in ids(client):
        pass
    client.add_storage(last.id, [str(storage)])
    client.destroy_snapshots([last.id])
    wait_until("the storage is as before", lambda: storage.stat().st_size == LIMIT)


def test_its_process_ends_it(client: Client, two: Two, process: subprocess.Popen[bytes]) -> None:
    mine = take(client, two, two.first, while_pid=os.getpid())
    its = take(client, two, two.second, ttl=LONG, while_pid=process.pid)
    assert (its.while_pid, its.ttl) == (process.pid, LONG)
    process.kill()  # not reaped: it has ended all the same
    wait_for_end(client, its)
    wait_for_events(client, its, "taken", "expired", "destroyed")
    assert ids(client) == {mine.id}
    client.destroy_snapshots([mine.id])


def test_a_process_that_has_ended_is_refused(
    client: Client, two: Two, process: subprocess.Popen[bytes], daemon: OwnDaemon
) -> None:
    process.kill()
    process.wait()
    with pytest.raises(UsageError, match="no such process"):
        take(client, two, two.first, while_pid=process.pid)
    options = ["--storage", str(two.directory), "--limit", str(LIMIT), "--while-pid", str(process.pid)]
    done = daemon.cli("snapshot", "create", two.first, *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"blksnap-ublk: snapshot create: --while-pid {process.pid}: no such process")
    assert ids(client) == set()


def test_renewing_prolongs(client: Client, two: Two, daemon: OwnDaemon) -> None:
    renewed = take(client, two, two.first, ttl=15)
    done = daemon.cli("snapshot", "renew", renewed.id[:8], "--ttl", "2h")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shown = client.show_snapshot(renewed.id)
    assert shown.ttl == 7200
    assert shown.expires is not None
    assert renewed.expires is not None
    assert shown.expires > renewed.expires
    # Taken later, with the time to live that the first one had.
    other = take(client, two, two.second, ttl=15)
    wait_for_end(client, other)
    assert ids(client) == {renewed.id}
    assert kinds(client, renewed) == ["taken", "renewed"]
    client.renew_snapshot(renewed.id, ttl=1)
    wait_for_end(client, renewed)


def test_one_without_time_to_live_is_not_renewed(client: Client, two: Two, daemon: OwnDaemon) -> None:
    snapshot = take(client, two, two.first)
    done = daemon.cli("snapshot", "renew", snapshot.id)
    assert done.returncode == 2
    text = f"snapshot renew: snapshot {snapshot.id}: has no time to live; give --ttl TIME"
    assert done.stderr == f"blksnap-ublk: {text}\n"
    assert client.renew_snapshot(snapshot.id, ttl=1).ttl == 1
    wait_for_end(client, snapshot)


def test_lifetimes_go_on_when_control_is_killed(
    client: Client, two: Two, daemon: OwnDaemon, process: subprocess.Popen[bytes]
) -> None:
    lasting = take(client, two, two.first, ttl=LONG, while_pid=os.getpid())
    write_at(two.first, 0, os.urandom(UNIT))
    its = take(client, two, two.second, while_pid=process.pid)
    kill_control(daemon)
    with daemon.client() as other:
        assert ids(other) == {lasting.id, its.id}
        found = other.show_snapshot(lasting.id)
        assert (found.expires, found.ttl, found.while_pid) == (lasting.expires, LONG, os.getpid())
        os.kill(daemon.pid("control"), signal.SIGSTOP)
        process.kill()
        process.wait()
        kill_control(daemon)
    with daemon.client() as last:
        wait_for_end(last, its)
        wait_for_events(last, its, "taken", "expired", "destroyed")
        assert ids(last) == {lasting.id}
        assert last.check_snapshot(lasting.id).trusted
        short = take(last, two, two.second, ttl=2)
        kill_control(daemon)
    with daemon.client() as last:
        wait_for_end(last, short)
        assert last.renew_snapshot(lasting.id, ttl=1).id == lasting.id
        wait_for_end(last, lasting)


def test_whoever_reads_an_image_gets_an_error(client: Client, two: Two, process: subprocess.Popen[bytes]) -> None:
    snapshot = take(client, two, two.first, while_pid=process.pid)
    (image,) = snapshot.images
    descriptor = os.open(image.image, os.O_RDONLY | os.O_CLOEXEC)
    reading = threading.Event()
    ended: list[int | None] = []

    def read() -> None:
        try:
            while True:
                read_at(f"/proc/self/fd/{descriptor}", 0, UNIT)
                reading.set()
        except OSError as error:
            ended.append(error.errno)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert reading.wait(60)
        process.kill()
        wait_for_end(client, snapshot)
        reader.join(60)
        assert not reader.is_alive()
        assert ended[0] in (errno.EIO, errno.ENXIO, errno.ENODEV)
        assert errno_of_read(two.first, 0, UNIT) == 0
    finally:
        process.kill()
        os.close(descriptor)
        reader.join()
    wait_until("its disk has gone", lambda: not Path(image.image).exists())


@contextmanager
def mounted_image(path: str, directory: Path) -> Iterator[Path]:
    directory.mkdir()
    run("mount", "-t", "ext4", "-o", "ro,noload", path, str(directory))
    try:
        yield directory
    finally:
        run("umount", str(directory))


def test_an_image_that_is_mounted(client: Client, two: Two) -> None:
    run("mkfs.ext4", "-q", two.first)
    snapshot = take(client, two, two.first, ttl=LONG)
    (image,) = snapshot.images
    with mounted_image(image.image, two.directory / "mount") as mount:
        assert os.listdir(mount) == ["lost+found"]
        client.renew_snapshot(snapshot.id, ttl=1)
        wait_for_end(client, snapshot)
        wait_until("the event destroyed", lambda: "destroyed" in kinds(client, snapshot))
        assert kinds(client, snapshot)[-2:] == ["expired", "destroyed"]
        assert errno_of_read(image.image, 0, UNIT) != 0
    wait_until("its disk has gone", lambda: not Path(image.image).exists())
    run("e2fsck", "-fn", two.first)


def test_of_several_the_error_says_which_are_gone(client: Client, two: Two, daemon: OwnDaemon) -> None:
    one, other = take(client, two, two.first), take(client, two, two.second)
    (image,) = other.images
    descriptor = os.open(image.image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = daemon.cli("snapshot", "destroy", "--json", one.id, other.id)
    finally:
        os.close(descriptor)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"blksnap-ublk: snapshot destroy: snapshot {other.id}: {image.image}: ")
    assert done.stderr.endswith(f"; destroyed before: {one.id}\n")
    assert ids(client) == {other.id}
    client.destroy_snapshots([other.id])
