# SPDX-License-Identifier: MIT
"""A filtered device follows its origin, which has grown; nothing that is known of it before is lost."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import Failed
from blksnap_ublk.host import blockdev
from demo import blocks
from tests.direct_io import read_at, write_at
from tests.loop_devices import loop_device, mounted, run
from tests.own_daemon import OwnDaemon

MIB = 1 << 20
BLOCK = 64 << 10
SIZE = 32 * MIB + 3 * 4096
"""Within a tracking block."""
LARGE = 80 * MIB + 512 * 5


@pytest.fixture
def disk(folder: Path) -> Path:
    return folder / "disk"


@pytest.fixture
def origin(disk: Path) -> Iterator[str]:
    with loop_device(disk, SIZE) as path:
        yield path


@pytest.fixture
def device(client: Client, origin: str) -> Iterator[str]:
    attached = client.attach(origin)
    yield attached.device
    for snapshot in client.list_snapshots():
        client.destroy_snapshots([snapshot.id], force=True)
    client.detach(origin, force=True)


def grow(origin: str, disk: Path, size: int) -> None:
    os.truncate(disk, size)
    run("losetup", "-c", origin)


@contextmanager
def writing(device: str, size: int) -> Iterator[None]:
    """Somebody writes to the first `size` bytes all the time, without an error."""
    over = threading.Event()
    failed: list[OSError] = []

    def write() -> None:
        at = 0
        while not over.is_set():
            try:
                write_at(device, at, os.urandom(4096))
            except OSError as error:
                failed.append(error)
                return
            at = (at + 123 * 4096) % (size - size % 4096)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failed, failed


def test_everything_goes_on(client: Client, device: str, origin: str, disk: Path, folder: Path) -> None:
    """Snapshots of before stay as they were; increments over the growth make complete copies."""
    write_at(device, 5 * MIB, b"1" * 4096)
    first = client.create_snapshot([device], storage=[str(folder)], limit=SIZE + MIB)
    before, copy = folder / "before", folder / "copy"
    blocks.full_copy(first.images[0].image, SIZE, before)
    blocks.full_copy(first.images[0].image, SIZE, copy)
    write_at(device, 7 * MIB, b"2" * 4096)
    grow(origin, disk, LARGE)
    with writing(device, SIZE):
        resized = client.resize(device)
    assert (resized.former_size, resized.device.size) == (SIZE, LARGE)
    assert blockdev.describe(device).size == LARGE
    write_at(device, LARGE - 512 * 5 - 4096, b"3" * 4096)
    assert read_at(origin, LARGE - 512 * 5 - 4096, 4096) == b"3" * 4096
    write_at(device, SIZE, b"4" * 4096)  # the rest of the block that was the last one
    shown = client.show_snapshot(first.id)
    assert shown.state == "active"
    assert shown.images[0].size == SIZE
    assert blockdev.describe(shown.images[0].image).size == SIZE
    assert blocks.first_difference(shown.images[0].image, SIZE, before) is None
    second = client.create_snapshot([device], storage=[str(folder)], limit=LARGE + MIB)
    assert second.images[0].size == LARGE
    changes = client.changes(device, since=first.images[0].cursor, until=second.id)
    assert not changes.all
    os.truncate(copy, LARGE)
    blocks.apply(second.images[0].image, [(int(a), int(b)) for a, b in changes.ranges], copy)
    assert blocks.first_difference(second.images[0].image, LARGE, copy) is None
    # All that it has grown by counts as changed, and nothing of that up to the snapshot of before.
    last = [int(each) for each in changes.ranges[-1]]
    assert last[0] <= SIZE
    assert last[0] + last[1] == LARGE
    none = client.changes(device, since=None, until=first.id)
    assert [[int(a), int(b)] for a, b in none.ranges] == [[5 * MIB, BLOCK]]
    foreign = client.changes(device, since="00000000-0000-4000-8000-000000000000:1", until=first.id)
    assert (foreign.all, foreign.changed_bytes) == (True, SIZE)
    # and once more, with an array in the history
    client.destroy_snapshots([first.id])
    grow(origin, disk, LARGE + 16 * MIB)
    assert client.resize(device).device.size == LARGE + 16 * MIB
    third = client.create_snapshot([device], storage=[str(folder)], limit=MIB)
    changes = client.changes(device, since=second.images[0].cursor, until=third.id)
    assert not changes.all
    assert int(changes.ranges[-1][0] + changes.ranges[-1][1]) == LARGE + 16 * MIB
    events = [event for event in client.events(follow=False) if event.type == "resized"]
    assert events[-1].data == {"size": LARGE + 16 * MIB, "former_size": LARGE}


def test_writes_to_images_are_changes_after_it_too(
    client: Client, device: str, origin: str, disk: Path, folder: Path
) -> None:
    """The map that writes to the newest image are marked in is another one after it."""
    first = client.create_snapshot([device], storage=[str(folder)], limit=SIZE + MIB)
    grow(origin, disk, LARGE)
    client.resize(device)
    write_at(first.images[0].image, 3 * MIB, b"i" * 4096)
    second = client.create_snapshot([device], storage=[str(folder)], limit=MIB)
    changes = client.changes(device, since=first.images[0].cursor, until=second.id)
    assert [3 * MIB, BLOCK] in [[int(a), int(b)] for a, b in changes.ranges]


def test_mounted_file_system(client: Client, device: str, origin: str, disk: Path, folder: Path) -> None:
    with mounted(device, folder / "mounted") as directory:
        (directory / "file").write_bytes(b"f" * MIB)
        snapshot = client.create_snapshot([device], storage=[str(folder)], limit=SIZE + MIB)
        grow(origin, disk, LARGE)
        client.resize(device)
        run("resize2fs", device)
        (directory / "large").write_bytes(b"l" * 40 * MIB)
        assert client.check_snapshot(snapshot.id).trusted
        client.destroy_snapshots([snapshot.id])
    run("e2fsck", "-fn", device)


def test_same_size_and_smaller(daemon: OwnDaemon, client: Client, device: str, origin: str, disk: Path) -> None:
    done = daemon.cli("resize", device)
    assert (done.returncode, done.stdout) == (0, "")
    assert "already" in done.stderr
    grow(origin, disk, SIZE - MIB)
    done = daemon.cli("resize", origin)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot shrink" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(Failed):
        client.resize(device)
    grow(origin, disk, LARGE)
    done = daemon.cli("resize", origin, "--json")
    assert done.returncode == 0, done.stderr
    form = json.loads(done.stdout)
    assert (form["former_size"], form["device"]["size"]) == (SIZE, LARGE)
    assert daemon.cli("resize", "/dev/nothing").returncode == 3


def test_origin_that_grew_while_it_was_not_attached(client: Client, origin: str, disk: Path, folder: Path) -> None:
    told: list[str] = []
    run("mkfs.ext4", "-qF", origin)
    device = client.attach(origin)
    snapshot = client.create_snapshot([origin], storage=[str(folder)], limit=SIZE)
    client.destroy_snapshots([snapshot.id])
    client.detach(origin)
    grow(origin, disk, LARGE)
    with Client(client.path, start=False, warn=told.append) as other:
        other.attach(origin)
    assert any(str(SIZE) in text for text in told)
    snapshot = client.create_snapshot([origin], storage=[str(folder)], limit=MIB)
    changes = client.changes(origin, since=f"{device.generation}:1", until=snapshot.id)
    assert (changes.all, changes.reason, changes.changed_bytes) == (True, "resized", LARGE)
    client.destroy_snapshots([snapshot.id])
    client.detach(origin)
