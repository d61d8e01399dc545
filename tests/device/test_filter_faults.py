# SPDX-License-Identifier: MIT
"""Disks that fail or fall silent under a filtered device: the origin's result is its own, images are never wrong."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.forms import Snapshot
from tests.device_mapper import Mapped, mapped_table, missing_for_targets
from tests.direct_io import errno_of_read, errno_of_write, read_at, write_at
from tests.filtered import Filtered, filtered, granted_ways
from tests.fio import fio_verify
from tests.fio_load import fio_load
from tests.loop_devices import loop_device
from tests.own_daemon import OwnDaemon, wait_until

MIB = 1 << 20
SIZE = 16 * MIB
SECTORS = SIZE // 512
UNIT = 4096

no_dm = missing_for_targets("linear", "error")
no_dust = missing_for_targets("dust")
needs_dm = pytest.mark.skipif(no_dm is not None, reason=str(no_dm))
needs_dust = pytest.mark.skipif(no_dust is not None, reason=str(no_dust))


@contextmanager
def linear(folder: Path, name: str, size: int = SIZE) -> Iterator[tuple[Mapped, str]]:
    """A dm device above a loop device, and the loop device."""
    with loop_device(folder / name, size) as base:
        whole = f"0 {size // 512} linear {base} 0"
        with mapped_table(f"bsu-{os.getpid()}-{name}", whole) as device:
            yield device, base


def fill(path: str, size: int = SIZE) -> None:
    for start in range(0, size, MIB):
        write_at(path, start, os.urandom(MIB))


def in_flight(disk: str) -> int:
    """Requests that the kernel has handed to the driver."""
    return sum(map(int, Path(f"/sys/block/{Path(disk).name}/inflight").read_text().split()))


def destroy_by_force(daemon: OwnDaemon, snapshot: Snapshot) -> None:
    with daemon.client() as another:
        another.destroy_snapshots([snapshot.id], force=True)


def failing(base: str, first: int, count: int, sectors: int = SECTORS) -> list[str]:
    """The table of a device on `base` in which `count` sectors fail."""
    after = first + count
    return [
        *([f"0 {first} linear {base} 0"] if first else []),
        f"{first} {count} error",
        *([f"{after} {sectors - after} linear {base} {after}"] if after < sectors else []),
    ]


def expect_broken(daemon: OwnDaemon, disk: Filtered, snapshot: Snapshot, state: str) -> None:
    """The snapshot says so, its image answers EIO everywhere, and `snapshot check` ends with 6."""
    wait_until("it is broken", lambda: disk.state_of(snapshot) != "active")
    assert disk.state_of(snapshot) == state, daemon.log()
    image = snapshot.images[0].image
    assert [errno_of_read(image, start, UNIT) for start in (0, SIZE // 2, SIZE - UNIT)] == [errno.EIO] * 3
    checked = daemon.cli("snapshot", "check", snapshot.id)
    assert checked.returncode == 6
    assert state in checked.stderr


@needs_dust
def test_an_unreadable_sector_is_eio_in_the_image_for_its_unit_alone(client: Client, folder: Path, way: str) -> None:
    bad_sector = 5 * MIB // 512 + 3
    bad_unit = bad_sector * 512 // UNIT * UNIT
    with loop_device(folder / "disk", SIZE) as base:
        fill(base)
        copy = (folder / "disk").read_bytes()
        table = f"0 {SECTORS} dust {base} 0 512"
        with mapped_table(f"bsu-{os.getpid()}-dust", table) as dust, filtered(client, dust.path, way, folder) as disk:
            snapshot = disk.snapshot(folder)
            image = snapshot.images[0].image
            dust.message("addbadblock", str(bad_sector))
            dust.message("enable")
            # Not overwritten: the image reads the origin, and has its result.
            assert errno_of_read(image, bad_unit, UNIT) == errno.EIO
            assert read_at(image, bad_unit + UNIT, UNIT) == copy[bad_unit + UNIT : bad_unit + 2 * UNIT]
            # Overwritten: what cannot be read cannot be preserved. The write goes on, and cures the sector.
            fresh = os.urandom(3 * UNIT)
            write_at(disk.path, bad_unit - UNIT, fresh)
            assert read_at(disk.path, bad_unit - UNIT, 3 * UNIT) == fresh
            assert errno_of_read(image, bad_unit, UNIT) == errno.EIO
            assert read_at(image, bad_unit - UNIT, UNIT) == copy[bad_unit - UNIT : bad_unit]
            assert read_at(image, bad_unit + UNIT, UNIT) == copy[bad_unit + UNIT : bad_unit + 2 * UNIT]
            assert disk.state_of(snapshot) == "active"


@needs_dm
@pytest.mark.quick
def test_what_the_origin_refuses_the_filtered_device_refuses(client: Client, folder: Path, way: str) -> None:
    """With a snapshot and without; all else goes on, and the image has what can be read."""
    first, count = SECTORS // 2, 16
    start = first * 512
    with linear(folder, "origin") as (origin, base):
        fill(base)
        with filtered(client, origin.path, way, folder) as disk:
            origin.load(*failing(base, first, count))
            for held in (False, True):
                if held:
                    snapshot = disk.snapshot(folder)
                assert errno_of_write(disk.path, start, bytes(UNIT)) == errno.EIO
                assert errno_of_read(disk.path, start, UNIT) == errno.EIO
                assert errno_of_write(disk.path, start - 8 * UNIT, bytes(16 * UNIT)) == errno.EIO
                assert errno_of_write(disk.path, start - UNIT, b"x" * UNIT) == 0
                assert read_at(disk.path, start - UNIT, UNIT) == b"x" * UNIT
            assert disk.state_of(snapshot) == "active"
            # A write that failed may have changed something. The others were in the tracking block before.
            ranges = client.changes(disk.path, until=snapshot.id).ranges
            assert any(begin <= start < begin + length for begin, length in ranges)
            assert errno_of_read(snapshot.images[0].image, start, UNIT) == errno.EIO
            assert read_at(snapshot.images[0].image, start - UNIT, UNIT) == b"x" * UNIT


@needs_dm
@pytest.mark.quick
def test_a_storage_that_refuses_writes_breaks_the_snapshot_and_nothing_else(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    with ExitStack() as stack:
        origin = stack.enter_context(loop_device(folder / "origin", SIZE))
        storage, base = stack.enter_context(linear(folder, "storage"))
        disk = stack.enter_context(filtered(client, origin, way, folder))
        fill(disk.path)
        copy = disk.copy()
        snapshot = disk.snapshot(storage.path)
        write_at(disk.path, 0, os.urandom(8 * UNIT))
        disk.expect_equal(snapshot.images[0].image, copy)
        storage.load(*failing(base, 0, SECTORS - 8))
        fresh = os.urandom(8 * UNIT)
        write_at(disk.path, MIB, fresh)
        assert read_at(disk.path, MIB, 8 * UNIT) == fresh
        expect_broken(daemon, disk, snapshot, "corrupted")
        fio_verify(disk.path, "--ioengine=libaio", "--iodepth=8", "--verify_state_save=0", size="4m")
        disk.destroy(snapshot)
        # The change map is none the worse for it.
        after = disk.snapshot(folder)
        disk.expect_increment(copy, snapshot.images[0].cursor, after)


@needs_dm
def test_what_a_storage_cannot_give_back_breaks_the_snapshot(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    with ExitStack() as stack:
        origin = stack.enter_context(loop_device(folder / "origin", SIZE))
        storage, base = stack.enter_context(linear(folder, "storage"))
        disk = stack.enter_context(filtered(client, origin, way, folder))
        fill(disk.path)
        snapshot = disk.snapshot(storage.path)
        image = snapshot.images[0].image
        write_at(disk.path, 0, os.urandom(8 * UNIT))
        storage.load(*failing(base, 0, SECTORS - 8))
        assert errno_of_read(image, 0, UNIT) == errno.EIO
        expect_broken(daemon, disk, snapshot, "corrupted")


@needs_dm
def test_what_a_storage_gives_back_changed_breaks_the_snapshot(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    with ExitStack() as stack:
        origin = stack.enter_context(loop_device(folder / "origin", SIZE))
        storage, base = stack.enter_context(linear(folder, "storage"))
        disk = stack.enter_context(filtered(client, origin, way, folder))
        fill(disk.path)
        old = read_at(disk.path, 0, 4 * UNIT)
        snapshot = disk.snapshot(storage.path)
        image = snapshot.images[0].image
        write_at(disk.path, 0, os.urandom(4 * UNIT))
        stored = read_at(base, 0, SIZE)
        place = stored.index(old[UNIT : 2 * UNIT])
        write_at(base, place + 512, bytes(512))
        assert errno_of_read(image, UNIT, UNIT) == errno.EIO
        expect_broken(daemon, disk, snapshot, "corrupted")


def test_a_storage_that_is_too_small_overflows_under_fio(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    storage = folder / "storage"
    storage.write_bytes(bytes(MIB))
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        fill(disk.path)
        with fio_load(disk.path, size="4m") as load:
            load.wait_for_round()
            snapshot = disk.snapshot(f"{storage}:0+{MIB // 512}")
            wait_until("it overflows", lambda: disk.state_of(snapshot) != "active")
            load.wait_for_round()
        expect_broken(daemon, disk, snapshot, "overflown")
        disk.destroy(snapshot)
        cursor = snapshot.images[0].cursor
        with fio_load(disk.path, size="4m") as load:
            load.wait_for_round()
        after = disk.snapshot(folder)
        # The cursor of the broken snapshot is still good.
        changes = client.changes(disk.path, since=cursor, until=after.id)
        assert not changes.all
        assert 0 < changes.changed_bytes < SIZE


@needs_dm
def test_a_storage_that_falls_silent_holds_nobody_up_and_is_given_up_after_the_limit(
    daemon: OwnDaemon, client: Client, folder: Path
) -> None:
    """30 seconds, for both data ways at once."""
    with ExitStack() as stack:
        storages, disks, snapshots = [], [], []
        for way in granted_ways():
            origin = stack.enter_context(loop_device(folder / f"origin-{way}", SIZE))
            storage, _ = stack.enter_context(linear(folder, f"storage-{way}"))
            disk = stack.enter_context(filtered(client, origin, way, folder))
            fill(disk.path)
            snapshots.append(disk.snapshot(storage.path))
            write_at(disk.path, 0, os.urandom(UNIT))
            storage.suspend()
            stack.callback(storage.resume)
            storages.append(storage)
            disks.append(disk)
        fresh = os.urandom(UNIT)
        for disk in disks:
            write_at(disk.path, MIB, fresh)
            read_at(disk.path, 2 * MIB, UNIT)
            write_at(disk.path, 0, os.urandom(UNIT))
        assert [disk.state_of(snapshot) for disk, snapshot in zip(disks, snapshots, strict=True)] == [
            "active" for _ in disks
        ]
        for disk, snapshot in zip(disks, snapshots, strict=True):
            wait_until("it is given up", lambda disk=disk, snapshot=snapshot: disk.state_of(snapshot) != "active")  # type: ignore[misc]
            assert read_at(disk.path, MIB, UNIT) == fresh
            expect_broken(daemon, disk, snapshot, "corrupted")
            fio_verify(disk.path, "--ioengine=libaio", "--iodepth=8", "--verify_state_save=0", size="4m")
        for storage in storages:
            storage.resume()


@needs_dm
def test_force_ends_readers_and_writers_of_an_image_whose_storage_is_silent(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    with ExitStack() as stack:
        origin = stack.enter_context(loop_device(folder / "origin", SIZE))
        storage, _ = stack.enter_context(linear(folder, "storage"))
        disk = stack.enter_context(filtered(client, origin, way, folder))
        fill(disk.path)
        snapshot = disk.snapshot(storage.path)
        write_at(disk.path, 0, os.urandom(UNIT))
        image = snapshot.images[0].image
        pool = stack.enter_context(ThreadPoolExecutor())
        storage.suspend()
        stack.callback(storage.resume)
        users = [
            pool.submit(errno_of_read, image, 0, UNIT),
            pool.submit(errno_of_write, image, MIB, os.urandom(UNIT)),
        ]
        wait_until("both wait", lambda: in_flight(image) == 2)
        ending = pool.submit(destroy_by_force, daemon, snapshot)
        assert [user.result(60) for user in users] == [errno.EIO, errno.EIO]
        assert not ending.done(), "its storage is still in use"
        storage.resume()
        ending.result(60)
        assert not client.list_snapshots()
        write_at(disk.path, 0, os.urandom(UNIT))


@needs_dm
def test_no_snapshot_is_taken_while_the_origin_does_not_answer(client: Client, folder: Path, way: str) -> None:
    """A write that does not end cannot be waited for: the command fails, and everything is as before."""
    with ExitStack() as stack:
        origin, base = stack.enter_context(linear(folder, "origin"))
        fill(base)
        disk = stack.enter_context(filtered(client, origin.path, way, folder))
        copy = disk.copy()
        origin.suspend()
        stack.callback(origin.resume)
        fresh = os.urandom(UNIT)
        writer = threading.Thread(target=write_at, args=(disk.path, MIB, fresh))
        writer.start()
        flying = Path(f"/sys/block/{Path(disk.path).name}/inflight")
        wait_until("the write is under way", lambda: int(flying.read_text().split()[1]) > 0)
        with pytest.raises(BlksnapError, match="did not come to rest within"):
            disk.snapshot(folder)
        assert client.list_snapshots() == []
        origin.resume()
        writer.join()
        # One that comes after it counts from the beginning, as if nobody had tried.
        assert client.describe_changes(disk.path).change_number == 0
        snapshot = disk.snapshot(folder)
        write_at(disk.path, MIB, os.urandom(UNIT))
        image = read_at(snapshot.images[0].image, 0, SIZE)
        assert image == copy.read_bytes()[:MIB] + fresh + copy.read_bytes()[MIB + UNIT :]


@needs_dm
def test_an_origin_that_fails_all_at_once(client: Client, folder: Path, way: str) -> None:
    """Errors everywhere, no hang; and when the disk is back, so is the device."""
    with linear(folder, "origin") as (origin, base), filtered(client, origin.path, way, folder) as disk:
        fill(disk.path)
        snapshot = disk.snapshot(folder)
        origin.load(f"0 {SECTORS} error")
        assert errno_of_write(disk.path, MIB, bytes(UNIT)) == errno.EIO
        assert errno_of_read(disk.path, 2 * MIB, UNIT) == errno.EIO
        assert errno_of_read(snapshot.images[0].image, 2 * MIB, UNIT) == errno.EIO
        origin.load(f"0 {SECTORS} linear {base} 0")
        assert errno_of_write(disk.path, MIB, bytes(UNIT)) == 0
        assert read_at(disk.path, MIB, UNIT) == bytes(UNIT)
        assert errno_of_read(snapshot.images[0].image, 2 * MIB, UNIT) == 0
        assert disk.state_of(snapshot) == "active"
