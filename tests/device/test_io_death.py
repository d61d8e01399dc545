# SPDX-License-Identifier: MIT
"""kill -9 of the io process, alone or with others: users of devices and images see a pause, and nothing is lost."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from demo import blocks
from tests.device_mapper import mapped_table, missing_for_targets
from tests.direct_io import errno_of_read, read_at, write_at
from tests.fio_load import fio_load
from tests.killing import EVERYBODY, answers, kill, kill_and_wait
from tests.loop_devices import loop_device, mounted
from tests.mounted_image import mounted_image
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
SIZE = 48 * MIB
DATA = b"d" * 4096

missing = missing_for_targets("linear")
needs_mapper = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon() as running:
        yield running


@dataclass
class Two:
    """Two filtered devices, and the storage file that snapshots share."""

    daemon: OwnDaemon
    folder: Path
    devices: list[str]

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    def client(self) -> Client:
        return self.daemon.client()


@pytest.fixture
def two(daemon: OwnDaemon, folder: Path) -> Iterator[Two]:
    with ExitStack() as stack:
        origins = [stack.enter_context(loop_device(folder / name, SIZE)) for name in ("first", "second")]
        with daemon.client() as client:
            devices = [client.attach(origin).device for origin in origins]
        made = Two(daemon, folder, devices)
        made.storage.write_bytes(bytes(120 * MIB))
        clean = False
        try:
            yield made
            clean = True
        finally:
            with daemon.client() as client:
                client.destroy_snapshots([each.id for each in client.list_snapshots()], force=not clean)
                for device in devices:
                    client.detach(device, force=not clean)


@contextmanager
def readers(images: list[tuple[str, str]]) -> Iterator[None]:
    """Threads that read images, (path, hash) each, again and again; any error and any other content fails the block."""
    stop = threading.Event()

    def read(path: str, digest: str) -> None:
        while not stop.is_set():
            assert blocks.sha256(path, SIZE) == digest, f"{path} has changed"

    with ThreadPoolExecutor(len(images)) as threads:
        reading = [threads.submit(read, path, digest) for path, digest in images]
        try:
            yield
        finally:
            stop.set()
        for each in reading:
            each.result()


def expect_changes(client: Client, before: forms.Snapshot, after: forms.Snapshot, folder: Path) -> None:
    """A copy of each image of `before` becomes that of `after` by the changes that are told."""
    for former, image in zip(before.images, after.images, strict=True):
        copy = folder / "copy"
        blocks.full_copy(former.image, SIZE, copy)
        changes = client.changes(former.device, since=former.cursor, until=after.id)
        assert not changes.all, changes.reason
        blocks.apply(image.image, [(int(start), int(length)) for start, length in changes.ranges], copy)
        assert blocks.first_difference(image.image, SIZE, copy) is None, f"a change of {former.device} was missed"


DEATHS = {
    "io": [("io",)],
    "io, again and again": [("io",), ("io",), ("io",)],
    "io and control": [("io", "control")],
    "io and its spare": [("io", "io-spare")],
    "io and keeper": [("io", "keeper")],
    "everybody": [EVERYBODY],
}


@pytest.mark.parametrize("deaths", DEATHS.values(), ids=list(DEATHS))
def test_everything_goes_on(two: Two, deaths: list[tuple[str, ...]]) -> None:
    with ExitStack() as stack:
        loads = [stack.enter_context(fio_load(device)) for device in two.devices]
        with two.client() as client:
            taken = [client.create_snapshot(two.devices, storage=[str(two.storage)])]
            loads[0].wait_for_round()
            taken.append(client.create_snapshot(two.devices, storage=[f"@{taken[0].id}"]))
            own = two.folder / "own"
            own.write_bytes(bytes(SIZE + MIB))
            taken.append(client.create_snapshot([two.devices[1]], storage=[str(own)]))
        write_at(taken[1].images[0].image, MIB, DATA)
        images = [image.image for each in taken for image in each.images]
        hashes = [(image, blocks.sha256(image, SIZE)) for image in images]
        with readers(hashes[1:4]):
            for roles in deaths:
                kill_and_wait(two.daemon, *roles)
                for load in loads:
                    load.wait_for_round()
        with two.client() as client:
            assert [each.state.value for each in client.list_snapshots()] == ["active"] * 3, two.daemon.log()
            for each in taken:
                now = client.show_snapshot(each.id)
                assert list(map(without_bytes, now.images)) == list(map(without_bytes, each.images))
            last = client.create_snapshot(two.devices, storage=[f"@{taken[0].id}"])
            expect_changes(client, taken[0], last, two.folder)
        for image, digest in hashes:
            assert blocks.sha256(image, SIZE) == digest, f"{image} has changed\n{two.daemon.log()}"
        with two.client() as client:
            client.destroy_snapshots([taken[1].id])
        for image, digest in (hashes[0], hashes[1], hashes[4]):
            assert blocks.sha256(image, SIZE) == digest, f"{image} has changed when another one was destroyed"


def without_bytes(image: forms.Image) -> forms.Image:
    """But for how much is preserved."""
    return msgspec.structs.replace(image, preserved_bytes=0)


def test_file_systems_in_images_go_on(two: Two) -> None:
    """One is mounted to be written to, on a device that is mounted too."""
    with ExitStack() as stack:
        point = stack.enter_context(mounted(two.devices[0], two.folder / "device"))
        (point / "file").write_bytes(os.urandom(4 * MIB))
        digest = hashlib.sha256((point / "file").read_bytes()).hexdigest()
        with two.client() as client:
            snapshot = client.create_snapshot([two.devices[0]], storage=[str(two.storage)])
        image = stack.enter_context(mounted_image("ext4", snapshot.images[0].image, two.folder / "image"))
        for n in range(3):
            (point / "file").write_bytes(bytes([n]) * 4 * MIB)
            (image / f"new-{n}").write_bytes(bytes([n]) * MIB)
            kill(two.daemon, "io")
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
            assert hashlib.sha256((image / "file").read_bytes()).hexdigest() == digest
            assert (point / "file").read_bytes() == bytes([n]) * 4 * MIB
            for m in range(n + 1):
                assert (image / f"new-{m}").read_bytes() == bytes([m]) * MIB
        wait_until("the daemon answers", lambda: answers(two.daemon))
        with two.client() as client:
            assert client.check_snapshot(snapshot.id).trusted


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 4]))


def gone(path: Path) -> None:
    path.unlink()


STATE = {
    "image": ("image-{0}.0", True),
    "storage": ("storage-*", True),
    "records": ("records-*.0", True),
    "map memory": ("map-0", True),
    "buffers": ("buffers-*", True),
    "history": ("device-*/history.json", False),
    "bitmaps": ("device-*/bitmap.*", False),
    "swallowed trims": ("device-*/swallowed", False),
}


@pytest.mark.parametrize("damage", [cut, flip, gone], ids=["cut", "flipped", "gone"])
@pytest.mark.parametrize(("names", "costs"), STATE.values(), ids=list(STATE))
def test_damaged_state_costs_a_snapshot_at_most(two: Two, names: str, costs: bool, damage: object) -> None:
    """What is lost is told; the device is as it was, and its changes are, or are said to be unknown."""
    assert callable(damage)
    device = two.devices[0]
    write_at(device, 0, b"a" * MIB)
    with two.client() as client:
        first = client.create_snapshot([device], storage=[str(two.storage)])
        write_at(device, 0, b"b" * 4096)
        second = client.create_snapshot([device], storage=[f"@{first.id}"])
        own = two.folder / "own"
        own.write_bytes(bytes(4 * MIB))
        third = client.create_snapshot([two.devices[1]], storage=[str(own)])
    write_at(device, 4096, b"c" * 4096)
    held = {
        first.id: b"a" * MIB,
        second.id: b"b" * 4096 + b"a" * (MIB - 4096),
        third.id: bytes(MIB),
    }
    paths = sorted((two.daemon.runtime / "state").glob(names.format(second.id)))
    assert paths
    kill(two.daemon, "control", "io")
    for path in paths:
        damage(path)
    wait_until("the daemon answers", lambda: answers(two.daemon))
    write_at(device, 8192, b"d" * 4096)
    assert read_at(device, 0, MIB) == b"b" * 4096 + b"c" * 4096 + b"d" * 4096 + b"a" * (MIB - 12288)
    with two.client() as client:
        for snapshot in (first, second, third):
            image = snapshot.images[0].image
            with suppress(OSError):
                read_at(image, 0, MIB)  # finds what the storage lacks, of which only checksums tell
            shown = client.show_snapshot(snapshot.id)
            if shown.state.value == "active":
                assert read_at(image, 0, MIB) == held[snapshot.id]
            else:
                assert costs, f"{shown.error}\n{two.daemon.log()}"
                assert shown.state.value == "corrupted"
                assert shown.error
                assert shown.images[0].image == "" or errno_of_read(image, 0, 4096) != 0
        last = client.create_snapshot([device], storage=[str(two.folder)], limit=MIB)
        changes = client.changes(device, since=first.images[0].cursor, until=last.id)
        assert changes.all or changes.ranges[0].tolist() == [0, 65536]
        client.destroy_snapshots([last.id])


def test_the_entry_of_a_device_is_built_again(two: Two) -> None:
    """Both its files are damaged when control and io die."""
    write_at(two.devices[0], 0, DATA)
    with two.client() as client:
        before = {each.device: each for each in client.list_devices()}
    kill(two.daemon, "control", "io")
    for path in (two.daemon.runtime / "state" / "catalogue").glob("device-*"):
        path.write_bytes(b"{}")
    wait_until("the daemon answers", lambda: answers(two.daemon))
    assert read_at(two.devices[0], 0, len(DATA)) == DATA
    with two.client() as client:
        assert {each.device: each for each in client.list_devices()} == before


def test_a_lost_snapshot_does_not_take_another_device_with_it(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    """The id of its image's device is given to the next device."""
    (folder / "storage").write_bytes(bytes(4 << 20))
    with loop_device(folder / "first", SIZE) as first, loop_device(folder / "second", SIZE) as second:
        device = client.attach(first).device
        snapshot = client.create_snapshot([device], storage=[str(folder / "storage")])
        gone(daemon.runtime / "state" / f"image-{snapshot.id}.0")
        kill_and_wait(daemon, "io")
        wait_until("the snapshot is lost", lambda: client.show_snapshot(snapshot.id).state.value == "corrupted")
        wait_until("its image is gone", lambda: client.show_snapshot(snapshot.id).images[0].image == "")
        other = client.attach(second).device
        assert other == snapshot.images[0].image
        write_at(other, 0, DATA)
        client.destroy_snapshots([snapshot.id])
        write_at(other, len(DATA), DATA)
        assert read_at(other, 0, 2 * len(DATA)) == 2 * DATA
        client.detach(other)
        client.detach(device)
        assert read_at(second, 0, 2 * len(DATA)) == 2 * DATA


@needs_mapper
def test_recovery_does_not_wait_for_a_freeze_that_waits_for_it(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    """What is dirty is written before the freeze: to a device that has no server any more."""
    mount = folder / "mount"
    mount.mkdir()
    (folder / "storage").write_bytes(bytes(4 << 20))
    with ExitStack() as stack:
        disk = stack.enter_context(loop_device(folder / "disk", SIZE))
        origin = stack.enter_context(mapped_table("blksnap-origin", f"0 {SIZE // 512} linear {disk} 0"))
        device = client.attach(origin.path).device
        stack.callback(client.detach, device)
        stack.enter_context(mounted(device, mount))
        (mount / "file").write_bytes(bytes(16 << 20))
        origin.suspend()
        try:
            create = ("snapshot", "create", device, "--storage", str(folder / "storage"))
            with ThreadPoolExecutor(1) as threads:
                created = threads.submit(daemon.cli, *create)
                wait_until("dirty data is on its way", lambda: writes_in_flight(device) > 0)
                kill(daemon, "io")
                origin.resume()
                assert "the io process died" in created.result().stderr
        finally:
            origin.resume()
        wait_until("the device is back", lambda: answers(daemon))
        assert client.list_snapshots() == []
        (mount / "other").write_bytes(DATA)
        os.sync()
        client.destroy_snapshots([client.create_snapshot([device], storage=[str(folder / "storage")]).id])


def writes_in_flight(disk: str) -> int:
    return int(Path(f"/sys/block/{Path(disk).name}/inflight").read_text().split()[1])
