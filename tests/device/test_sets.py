# SPDX-License-Identifier: MIT
"""Several devices in one snapshot, several snapshots of one device, storages that snapshots share."""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.errors import Busy, Failed, NotFound, UsageError
from blksnap_ublk.forms import Snapshot
from tests.device_mapper import mapped_table, missing_for_targets
from tests.direct_io import errno_of_read, read_at, write_at
from tests.filtered import Filtered, filtered, granted_ways
from tests.loop_devices import loop_device, process
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
SIZE = 8 * MIB
UNIT = 4096

no_dm = missing_for_targets("linear")
needs_dm = pytest.mark.skipif(no_dm is not None, reason=str(no_dm))


@contextmanager
def several(client: Client, folder: Path, way: str, count: int, size: int = SIZE) -> Iterator[list[Filtered]]:
    """Filtered devices with random contents, each with a directory of its own."""
    with ExitStack() as stack:
        found = []
        for n in range(count):
            own = folder / f"d{n}"
            own.mkdir()
            origin = stack.enter_context(loop_device(own / "disk", size))
            for start in range(0, size, MIB):
                write_at(origin, start, os.urandom(MIB))
            found.append(stack.enter_context(filtered(client, origin, way, own)))
        yield found


def take(client: Client, devices: list[Filtered], storage: Path | str) -> Snapshot:
    limit = sum(device.size for device in devices) + MIB if not str(storage).startswith("@") else None
    return client.create_snapshot([device.path for device in devices], storage=[str(storage)], limit=limit)


def take_and_destroy(client: Client, devices: list[Filtered], storage: Path) -> None:
    client.destroy_snapshots([take(client, devices, storage).id])


def scribble(device: Filtered, generator: random.Random, count: int = 20) -> None:
    """Overwrites some units, some of them for the second time."""
    for _ in range(count):
        length = generator.randrange(1, 9) * UNIT
        start = generator.randrange((device.size - length) // UNIT + 1) * UNIT
        write_at(device.path, start, os.urandom(length))


class Held:
    """A snapshot, and what its images must show."""

    def __init__(self, client: Client, devices: list[Filtered], storage: Path | str, name: str) -> None:
        self.devices = devices
        self.copies = [device.copy(name) for device in devices]
        self.snapshot = take(client, devices, storage)

    def expect_right(self) -> None:
        assert len(self.snapshot.images) == len(self.devices)
        for device, image, copy in zip(self.devices, self.snapshot.images, self.copies, strict=True):
            assert image.device == device.path
            device.expect_equal(image.image, copy)


@pytest.fixture
def any_way() -> str:
    """For what is the same on each data way."""
    return granted_ways()[-1]


@pytest.fixture
def generator() -> random.Random:
    """Its seed is printed, so that a failure shows it."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("count", [2, 3])
def test_all_members_are_of_one_instant(client: Client, folder: Path, way: str, count: int) -> None:
    """A counter goes to the first device and then to the next: no later device is ahead in an image."""
    with several(client, folder, way, count) as devices:
        for device in devices:
            write_at(device.path, 0, bytes(UNIT))
        stop = threading.Event()
        failures: list[OSError] = []

        def count_up() -> None:
            n = 0
            try:
                while not stop.is_set():
                    n += 1
                    for device in devices:
                        write_at(device.path, 0, struct.pack("<Q", n).ljust(UNIT, b"\0"))
            except OSError as error:
                failures.append(error)

        writer = threading.Thread(target=count_up)
        writer.start()
        try:
            for _ in range(8):
                snapshot = take(client, devices, folder)
                counts = [struct.unpack("<Q", read_at(image.image, 0, UNIT)[:8])[0] for image in snapshot.images]
                assert [image.device for image in snapshot.images] == [device.path for device in devices]
                assert counts == sorted(counts, reverse=True)
                assert counts[0] - counts[-1] <= 1
                again = [struct.unpack("<Q", read_at(image.image, 0, UNIT)[:8])[0] for image in snapshot.images]
                assert again == counts
                client.destroy_snapshots([snapshot.id])
        finally:
            stop.set()
            writer.join()
        assert not failures


def test_the_events_name_all_members(client: Client, folder: Path, any_way: str) -> None:
    with several(client, folder, any_way, 2) as devices:
        snapshot = take(client, devices, folder)
        paths = [device.path for device in devices]
        assert [device.snapshots for device in client.list_devices()] == [[snapshot.id]] * 2
        client.destroy_snapshots([snapshot.id])
        events = [event for event in client.events(since=0) if event.snapshot == snapshot.id]
        assert [event.type for event in events] == ["taken", "destroyed"]
        assert all(event.device is None and event.data["devices"] == paths for event in events)
        assert events[0].data["cursors"] == [image.cursor for image in snapshot.images]


@pytest.mark.quick
def test_overlapping_sets_and_any_order_of_ends(
    client: Client, folder: Path, way: str, generator: random.Random
) -> None:
    with several(client, folder, way, 3) as (a, b, c):
        held = []
        for n, members in enumerate([[a, b], [b, c], [b], [c, b, a], [a]]):
            held.append(Held(client, members, folder, f"copy{n}"))
            for device in (a, b, c):
                scribble(device, generator)
        for each in held:
            each.expect_right()
        while held:
            going = held.pop(generator.randrange(len(held)))
            client.destroy_snapshots([going.snapshot.id])
            with pytest.raises(NotFound):
                client.show_snapshot(going.snapshot.id)
            scribble(generator.choice([a, b, c]), generator)
            for each in held:
                each.expect_right()
        for device in (a, b, c):
            device.expect_equal(device.origin, device.copy("now"))


def test_snapshots_share_a_storage(client: Client, folder: Path, any_way: str, generator: random.Random) -> None:
    """It is there until the last of them goes, and its file is as it was then."""
    storage = folder / "storage"
    with several(client, folder, any_way, 2) as (a, b):
        first = Held(client, [a], storage, "first")
        assert storage.exists()
        scribble(a, generator)
        second = Held(client, [a, b], f"@{first.snapshot.id[:8]}", "second")
        third = Held(client, [b], f"@{second.snapshot.id}", "third")
        scribble(a, generator)
        scribble(b, generator)
        ids = [each.snapshot.id for each in (first, second, third)]
        shown = [client.show_snapshot(snapshot).storage for snapshot in ids]
        assert all((each.used, each.limit) == (shown[0].used, a.size + MIB) for each in shown)
        assert all(each.capacity <= a.size + MIB for each in shown)
        assert all(each.snapshots == ids for each in shown)
        assert 0 < shown[0].used <= shown[0].capacity
        for going, left in ((first, [second, third]), (third, [second]), (second, [])):
            client.destroy_snapshots([going.snapshot.id])
            assert storage.exists() == bool(left)
            for device in (a, b):
                scribble(device, generator)
            for each in left:
                each.expect_right()
                expected = [other.snapshot.id for other in (first, second, third) if other in left]
                assert client.show_snapshot(each.snapshot.id).storage.snapshots == expected


def test_a_storage_that_cannot_be_shared_is_refused(client: Client, folder: Path, any_way: str) -> None:
    with several(client, folder, any_way, 1) as (a,), loop_device(folder / "other", SIZE) as origin:
        snapshot = take(client, [a], folder)
        with pytest.raises(NotFound, match="no such snapshot"):
            take(client, [a], "@ffffffff")
        with pytest.raises(UsageError, match="limit"):
            client.create_snapshot([a.path], storage=[f"@{snapshot.id}"], limit=MIB)
        other = client.attach(origin, unit=8192, tracking_block=65536)
        try:
            with pytest.raises(UsageError, match="unit"):
                client.create_snapshot([other.device], storage=[f"@{snapshot.id}"])
            with pytest.raises(UsageError, match=f"{other.device}: has a unit of 8192"):
                client.create_snapshot([a.path, other.device], storage=[str(folder)], limit=SIZE)
            with pytest.raises(UsageError, match="named twice"):
                client.create_snapshot([a.path, a.origin], storage=[str(folder)], limit=SIZE)
        finally:
            client.detach(other.device)
        assert [each.id for each in client.list_snapshots()] == [snapshot.id]


def test_twenty_snapshots_are_held(
    daemon: OwnDaemon, client: Client, folder: Path, any_way: str, generator: random.Random
) -> None:
    """In two storages, of two devices, with and without one another."""
    with several(client, folder, any_way, 2, 2 * MIB) as (a, b):
        held = [Held(client, [a, b], folder, "0"), Held(client, [b], folder, "1")]
        for n in range(2, 20):
            scribble(a, generator, 3)
            scribble(b, generator, 3)
            members = [[a], [b], [a, b]][n % 3]
            held.append(Held(client, members, f"@{held[n % 2].snapshot.id}", str(n)))
        scribble(a, generator)
        scribble(b, generator)
        for each in held:
            each.expect_right()
        os.kill(daemon.pid("control"), 9)
        wait_until("control is back", lambda: len(client_of(daemon)) == 20)
        for each in held:
            each.expect_right()
        with daemon.client() as again:
            generator.shuffle(held)
            again.destroy_snapshots([each.snapshot.id for each in held[:10]])
            for each in held[10:]:
                each.expect_right()
            again.destroy_snapshots([each.snapshot.id for each in held[10:]])
            assert not again.list_snapshots()


def client_of(daemon: OwnDaemon) -> list[Snapshot]:
    try:
        with daemon.client() as client:
            return client.list_snapshots()
    except Failed:
        return []


def test_the_io_process_dies_with_a_storage_that_is_shared(daemon: OwnDaemon, folder: Path, any_way: str) -> None:
    """All its snapshots live on, others can join it, and it goes with the last of them."""
    storage = folder / "storage"
    with daemon.client() as client, several(client, folder, any_way, 2) as (a, b):
        first = Held(client, [a, b], storage, "first")
        write_at(b.path, 0, os.urandom(UNIT))
        second = Held(client, [b], f"@{first.snapshot.id}", "second")
        write_at(b.path, 0, os.urandom(2 * UNIT))
        former = daemon.pid("io")
        os.kill(former, 9)
        wait_until("another io process", lambda: daemon.replaced("io", former))
        wait_until("the devices are live", lambda: {each.state.value for each in client.list_devices()} == {"live"})
        third = Held(client, [a], f"@{second.snapshot.id}", "third")
        write_at(a.path, 0, os.urandom(2 * UNIT))
        for each in (first, second, third):
            each.expect_right()
        client.destroy_snapshots([second.snapshot.id])
        first.expect_right()
        client.destroy_snapshots([first.snapshot.id])
        assert storage.exists()
        client.destroy_snapshots([third.snapshot.id])
        assert not storage.exists()
        Held(client, [a, b], storage, "again").expect_right()


@needs_dm
def test_one_member_that_does_not_come_to_rest(client: Client, folder: Path, any_way: str) -> None:
    """Nothing is taken; the error names the member; the others go on, as it does when its origin answers again."""
    with ExitStack() as stack:
        base = stack.enter_context(loop_device(folder / "slow", SIZE))
        table = f"0 {SIZE // 512} linear {base} 0"
        origin = stack.enter_context(mapped_table(f"bsu-{os.getpid()}-slow", table))
        slow = stack.enter_context(filtered(client, origin.path, any_way, folder))
        a, b = stack.enter_context(several(client, folder, any_way, 2))
        numbers = [device.change_number for device in client.list_devices()]
        data = os.urandom(UNIT)
        writer = threading.Thread(target=write_at, args=(slow.path, MIB, data))
        origin.suspend()
        try:
            writer.start()
            inflight = Path("/sys/block") / Path(slow.path).name / "inflight"
            wait_until("the write is under way", lambda: inflight.read_text().split()[1] == "1")
            with pytest.raises(Busy, match=rf"^{slow.path}: writes did not come to rest"):
                take(client, [a, slow, b], folder)
            for device in (a, b):
                write_at(device.path, 0, data)
                assert read_at(device.path, 0, UNIT) == data
            assert client.list_snapshots() == []
        finally:
            origin.resume()
            writer.join()
        assert read_at(slow.path, MIB, UNIT) == data
        assert [device.change_number for device in client.list_devices()] == numbers
        held = Held(client, [a, slow, b], folder, "later")
        write_at(slow.path, MIB, bytes(UNIT))
        held.expect_right()


def test_a_member_without_room_for_its_image_takes_the_others_back(
    daemon: OwnDaemon, client: Client, folder: Path, any_way: str
) -> None:
    with several(client, folder, any_way, 2) as (a, b):
        take_and_destroy(client, [a, b], folder)
        before = daemon.state()
        for pages in (0, 2, 4, 8, 12):
            with filled(daemon, leave=pages):
                with pytest.raises(Failed, match="--state-size"):
                    take_and_destroy(client, [a, b], folder)
                assert client.list_snapshots() == []
            assert daemon.state() == before
        Held(client, [a, b], folder, "copy").expect_right()


@contextmanager
def filled(daemon: OwnDaemon, leave: int = 0) -> Iterator[None]:
    """The memory for state is used up, but for some pages."""
    filler = daemon.runtime / "state" / "events-filler"
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        with filler.open("wb", buffering=0) as file:
            for block in (MIB, page):
                with suppress(OSError):
                    while file.write(bytes(block)):
                        pass
            file.truncate(max(0, file.tell() // page - leave) * page)
        yield
    finally:
        filler.unlink()


def test_without_memory_for_state_all_can_be_ended(folder: Path, any_way: str, generator: random.Random) -> None:
    with own_daemon() as daemon, daemon.client() as client, ExitStack() as stack:
        origins = [stack.enter_context(loop_device(folder / name, SIZE)) for name in ("x", "y")]
        with ExitStack() as detached:
            a, b = (
                detached.enter_context(filtered(client, origin, any_way, folder, detach=False)) for origin in origins
            )
            held = [Held(client, [a, b], folder, "first")]
            held.append(Held(client, [b], f"@{held[0].snapshot.id}", "second"))
            with filled(daemon):
                scribble(a, generator)
                scribble(b, generator)
                client.destroy_snapshots([held[0].snapshot.id])
                held[1].expect_right()
            with filled(daemon):
                client.destroy_snapshots([held[1].snapshot.id])
            with filled(daemon):
                client.detach(a.path)
                client.detach(b.path)


def test_the_device_of_a_set_can_be_detached_by_force(client: Client, folder: Path, any_way: str) -> None:
    """All its snapshots go, whole, and the other members stay."""
    with several(client, folder, any_way, 2) as (a, b):
        with loop_device(folder / "third", SIZE) as origin:
            third = client.attach(origin)
            paths = [a.path, third.device]
            both = client.create_snapshot(paths, storage=[str(folder)], limit=2 * SIZE + MIB)
            alone = client.create_snapshot([third.device], storage=[f"@{both.id}"])
            stays = Held(client, [b], folder, "stays")
            with pytest.raises(Busy, match=both.id):
                client.detach(third.device)
            done = client.detach(third.device, force=True)
            assert sorted(done.broken_snapshots) == sorted([both.id, alone.id])
        assert [each.id for each in client.list_snapshots()] == [stays.snapshot.id]
        write_at(a.path, 0, os.urandom(UNIT))
        stays.expect_right()
        Held(client, [a, b], folder, "again").expect_right()


READER = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
print("open", flush=True)
sys.stdin.read()
"""


def test_an_open_image_keeps_its_snapshot(client: Client, folder: Path, any_way: str) -> None:
    with several(client, folder, any_way, 2) as (a, b):
        free = Held(client, [a], folder, "free")
        used = Held(client, [a, b], folder, "used")
        image = used.snapshot.images[1].image
        with process(READER, image) as reader:
            with pytest.raises(Busy, match=rf"{image}: in use by .*{reader.pid}.*destroyed before: {free.snapshot.id}"):
                client.destroy_snapshots([free.snapshot.id, used.snapshot.id])
            used.expect_right()
            assert [each.id for each in client.list_snapshots()] == [used.snapshot.id]
            reading = os.open(image, os.O_RDONLY | os.O_DIRECT)
            try:
                client.destroy_snapshots([used.snapshot.id], force=True)
                with mmap.mmap(-1, UNIT) as buffer, suppress(OSError):
                    assert os.preadv(reading, [buffer], SIZE // 2) == 0, "a disk that has gone has no bytes"
            finally:
                os.close(reading)
        assert client.list_snapshots() == []
        wait_until("the image has gone", lambda: not Path(image).exists() or errno_of_read(image, 0, UNIT) != 0)


def test_a_refused_hook_aborts_and_the_others_are_told(folder: Path, any_way: str) -> None:
    hooks = folder / "hooks"
    seen = folder / "seen"
    for phase in ("before", "after"):
        (hooks / f"{phase}.d").mkdir(parents=True)
        script = hooks / f"{phase}.d" / "10-note"
        script.write_text(f"#!/bin/sh\necho $BLKSNAP_PHASE $BLKSNAP_TAKEN >> {seen}\ntest ! -e {folder}/refuse\n")
        script.chmod(0o755)
    with ExitStack() as stack:
        daemon = stack.enter_context(own_daemon(("-m", "blksnap_ublk.daemon.main", "--hooks", str(hooks))))
        client = stack.enter_context(daemon.client())
        devices = stack.enter_context(several(client, folder, any_way, 2))
        Held(client, devices, folder, "copy").expect_right()
        assert [line.split()[0] for line in seen.read_text().splitlines()] == ["before", "after"]
        assert seen.read_text().splitlines()[1] == "after 1"
        seen.unlink()
        (folder / "refuse").touch()
        with pytest.raises(Failed, match="10-note"):
            take(client, devices, folder)
        assert seen.read_text().splitlines()[-1] == "after 0"
        (folder / "refuse").unlink()
        assert len(client.list_snapshots()) == 1


def test_a_device_and_its_set_may_be_used_at_once(
    client: Client, daemon: OwnDaemon, folder: Path, any_way: str
) -> None:
    """Sets that overlap are taken and destroyed by several clients at the same time."""
    with several(client, folder, any_way, 3) as devices:
        failures: list[BaseException] = []

        def work(members: list[Filtered], name: str) -> None:
            try:
                with daemon.client() as own:
                    for n in range(4):
                        held = Held(own, members, folder, f"{name}{n}")
                        held.expect_right()
                        own.destroy_snapshots([held.snapshot.id])
            except BaseException as error:
                failures.append(error)

        sets = [[0, 1], [1, 2], [2, 0], [2, 1, 0]]
        workers = [
            threading.Thread(target=work, args=([devices[n] for n in members], f"w{index}-"))
            for index, members in enumerate(sets)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures, failures
        assert client.list_snapshots() == []
        assert all(isinstance(device, forms.Device) and not device.snapshots for device in client.list_devices())
