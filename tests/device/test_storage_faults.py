# SPDX-License-Identifier: MIT
"""Difference storage that is small, full, failing, slow, gone or changed behind our back, under fio with verification.

Whatever happens to it: fio ends without an error, a snapshot in another storage stays right, the one that is lost says
so and why, no image ever gives wrong data, and all can be destroyed (tests/lost_storage.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError
from tests.device_mapper import Mapped, mapped_table, missing_for_targets
from tests.direct_io import read_at, write_at
from tests.filtered import filtered, granted_ways
from tests.fio import fio_verify
from tests.fio_load import fio_load
from tests.full_file_systems import fill_file_system, tmpfs
from tests.loop_devices import loop_device, mounted, run
from tests.lost_storage import LOADED, MIB, SIZE, UNIT, lost_storage
from tests.null_block import missing_for_null_blocks, null_block, take_away
from tests.own_daemon import OwnDaemon, wait_until
from tests.seeds import dice

SECTORS = 2 * SIZE // 512
"""Of a storage that has room for everything."""

no_dm = missing_for_targets("linear", "error")
no_flakey = missing_for_targets("flakey")
no_delay = missing_for_targets("delay")
no_null_block = missing_for_null_blocks()
needs_dm = pytest.mark.skipif(no_dm is not None, reason=str(no_dm))
needs_flakey = pytest.mark.skipif(no_flakey is not None, reason=str(no_flakey))
needs_delay = pytest.mark.skipif(no_delay is not None, reason=str(no_delay))
needs_null_block = pytest.mark.skipif(no_null_block is not None, reason=str(no_null_block))

ONE_WAY = granted_ways()[-1]
"""For faults that are not on the way of the data."""


@contextmanager
def mapped_storage(folder: Path) -> Iterator[tuple[Mapped, str]]:
    """A dm device above a loop device, and the loop device."""
    with ExitStack() as stack:
        base = stack.enter_context(loop_device(folder / "storage", SECTORS * 512))
        name = f"bsu-{os.getpid()}-storage"
        yield stack.enter_context(mapped_table(name, f"0 {SECTORS} linear {base} 0")), base


# Nothing, next to nothing, too little


def test_storage_of_nothing_is_refused_and_loses_nothing(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    """An empty file, a device without a size, full file systems; while fio writes, and another snapshot is held."""
    with ExitStack() as stack:
        origin = stack.enter_context(loop_device(folder / "origin", SIZE))
        disk = stack.enter_context(filtered(client, origin, ONE_WAY, folder))
        full = stack.enter_context(tmpfs(folder / "full", MIB))
        base = stack.enter_context(loop_device(folder / "base", 32 * MIB))
        full_ext4 = stack.enter_context(mounted(base, folder / "ext4", mkfs=["-m", "0"]))
        none = stack.enter_context(loop_device(folder / "none", 0))
        for directory in (full, full_ext4):
            (directory / "begun").write_bytes(b"b" * 100)
            fill_file_system(directory)
        (folder / "empty").touch()
        (folder / "held").write_bytes(bytes(SIZE))
        write_at(disk.path, 0, os.urandom(LOADED))
        held = client.create_snapshot([disk.path], storage=[str(folder / "held")], limit=SIZE)
        copy = disk.copy()
        state = daemon.state()
        refused: list[tuple[Path | str, int | None, str]] = [
            (folder / "empty", None, "is empty"),
            (none, None, "has no size"),
            (full, MIB, "ENOSPC"),
            (full_ext4, MIB, "ENOSPC"),
            (full / "begun", MIB, "ENOSPC"),
            (full_ext4 / "missing", MIB, "ENOSPC"),
        ]
        with fio_load(disk.path, size=str(LOADED)) as load:
            for storage, limit, reason in refused:
                with pytest.raises(BlksnapError, match=reason):
                    client.create_snapshot([disk.path], storage=[str(storage)], limit=limit)
            load.wait_for_round()
        assert [snapshot.id for snapshot in client.list_snapshots()] == [held.id]
        assert daemon.state() == state
        assert (full / "begun").read_bytes() == b"b" * 100
        assert (folder / "empty").stat().st_size == 0
        assert sorted(os.listdir(full_ext4)) == ["ballast", "begun", "lost+found"]
        disk.expect_equal(held.images[0].image, copy)
        disk.destroy(held)
        disk.snapshot(folder)


def test_storage_of_one_unit(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    """It keeps a single write; the next one breaks the snapshot."""
    (folder / "storage").write_bytes(bytes(UNIT))
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        write_at(disk.path, 0, os.urandom(MIB))
        copy = disk.copy()
        snapshot = disk.snapshot(f"{folder / 'storage'}:0+8")
        write_at(disk.path, UNIT, os.urandom(UNIT))
        disk.expect_equal(snapshot.images[0].image, copy)
        storage = client.show_snapshot(snapshot.id).storage
        assert (storage.used, storage.capacity) == (UNIT, UNIT)
    with lost_storage(daemon, client, folder, way, f"{folder / 'storage'}:0+8") as story:
        story.wait_until_lost()
        story.expect_lost("overflown", "full")


def test_storages_of_random_small_sizes(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    """Several at once, each for a snapshot of its own: those that are full are lost, the others are right."""
    random = dice()
    sizes = [UNIT * random.randrange(1, 3 * LOADED // 2 // UNIT) for _ in range(4)]
    sizes += [512 * random.randrange(8, 2048) for _ in range(2)]
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        write_at(disk.path, 0, random.randbytes(LOADED))
        copy = disk.copy()
        snapshots = []
        for n, size in enumerate(sizes):
            (folder / f"storage{n}").write_bytes(bytes(size))
            snapshots.append(disk.snapshot(f"{folder / f'storage{n}'}:0+{size // 512}"))
        with fio_load(disk.path, "--bsrange=512-256k", size=str(LOADED)) as load:
            load.wait_for_round()
        for snapshot, size in zip(snapshots, sizes, strict=True):
            shown = client.show_snapshot(snapshot.id)
            assert shown.storage.capacity == size // UNIT * UNIT
            if shown.state.value == "active":
                disk.expect_equal(snapshot.images[0].image, copy)
                assert size >= LOADED
            else:
                assert (shown.state.value, size < LOADED) == ("overflown", True)
                assert "full" in str(shown.error)
        random.shuffle(snapshots)
        for snapshot in snapshots:
            disk.destroy(snapshot)


def test_a_tmpfs_that_others_fill(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    """What the storage has is its own, and no write beyond it is tried; afterwards all the space is there again."""
    with tmpfs(folder / "small", 8 * MIB) as small:
        with lost_storage(daemon, client, folder, ONE_WAY, str(small), limit=6 * MIB) as story:
            fill_file_system(small)
            story.wait_until_lost()
            story.expect_lost("overflown", "full")
            assert story.show().storage.capacity <= 8 * MIB
        (small / "ballast").unlink()
        status = os.statvfs(small)
        assert status.f_bfree == status.f_blocks


def test_a_thin_device_that_has_no_room_beneath(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    """A loop device on a sparse file: the device has room, its file system has not."""
    with ExitStack() as stack:
        small = stack.enter_context(tmpfs(folder / "small", 4 * MIB))
        thin = stack.enter_context(loop_device(small / "thin", SIZE))
        story = stack.enter_context(lost_storage(daemon, client, folder, way, thin))
        story.wait_until_lost()
        state, error = story.show().state.value, str(story.show().error)
        assert error
        story.expect_lost(state, error)


# Errors


@needs_dm
def test_a_device_that_starts_to_fail(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    with mapped_storage(folder) as (storage, _), lost_storage(daemon, client, folder, way, storage.path) as story:
        storage.load(f"0 {SECTORS} error")
        story.overwrite()
        story.expect_lost("corrupted", "EIO")


@needs_dm
def test_a_device_that_fails_from_some_place_on(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    """All before it is kept until the first failure, and given up with it."""
    first = SECTORS // 8
    with mapped_storage(folder) as (storage, base), lost_storage(daemon, client, folder, way, storage.path) as story:
        storage.load(f"0 {first} linear {base} 0", f"{first} {SECTORS - first} error")
        story.wait_until_lost()
        assert story.show().storage.used > 0
        story.expect_lost("corrupted", "EIO")


@needs_flakey
def test_a_device_that_fails_now_and_then(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    with mapped_storage(folder) as (storage, base), lost_storage(daemon, client, folder, way, storage.path) as story:
        storage.load(f"0 {SECTORS} flakey {base} 0 1 1 1 error_writes")
        story.wait_until_lost()
        story.expect_lost("corrupted", "EIO")


@needs_null_block
def test_a_device_that_is_taken_away(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    with null_block(2 * SIZE) as storage, lost_storage(daemon, client, folder, way, storage) as story:
        take_away(storage)
        assert not os.path.exists(storage)
        story.overwrite()
        shown = story.show()
        assert shown.state.value == "corrupted"
        story.expect_lost("corrupted", str(shown.error))


def test_a_loop_device_that_is_detached_works_until_it_is_closed(
    daemon: OwnDaemon, client: Client, folder: Path
) -> None:
    (folder / "storage").touch()
    os.truncate(folder / "storage", 2 * SIZE)
    storage = run("losetup", "--find", "--show", str(folder / "storage"))
    with ExitStack() as stack:
        detach = stack.enter_context(ExitStack())
        detach.callback(run, "losetup", "--detach", storage)
        with lost_storage(daemon, client, folder, ONE_WAY, storage) as story:
            detach.close()
            story.load.wait_for_round()
            story.overwrite()
            story.expect_active()
        backing = Path(f"/sys/block/{Path(storage).name}/loop/backing_file")
        wait_until("nobody holds it any more", lambda: not backing.exists())


def test_a_device_that_shrinks(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    with ExitStack() as stack:
        storage = stack.enter_context(loop_device(folder / "storage", 2 * SIZE))
        story = stack.enter_context(lost_storage(daemon, client, folder, ONE_WAY, storage))
        os.truncate(folder / "storage", MIB)
        run("losetup", "--set-capacity", storage)
        story.wait_until_lost()
        story.expect_lost("corrupted", str(story.show().error))


# Time


@needs_dm
def test_a_device_that_hangs_for_ten_seconds_loses_nothing(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    with mapped_storage(folder) as (storage, _), lost_storage(daemon, client, folder, way, storage.path) as story:
        storage.suspend()
        resume = threading.Timer(10, storage.resume)
        resume.start()
        try:
            story.overwrite()
        finally:
            resume.join()
        story.load.wait_for_round()
        story.expect_active()


@needs_delay
def test_a_device_that_takes_ten_seconds_for_each_write_loses_nothing(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    with ExitStack() as stack:
        storage, base = stack.enter_context(mapped_storage(folder))
        story = stack.enter_context(lost_storage(daemon, client, folder, way, storage.path))
        storage.load(f"0 {SECTORS} delay {base} 0 0 {base} 0 10000")
        story.overwrite()
        # The table that replaces it ends its delays.
        storage.load(f"0 {SECTORS} linear {base} 0")
        story.load.wait_for_round()
        story.expect_active()


@needs_dm
def test_a_device_that_never_answers_is_given_up_once(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    """All that follow go on while it is still silent; so does the snapshot in another storage."""
    with mapped_storage(folder) as (storage, _), lost_storage(daemon, client, folder, way, storage.path) as story:
        storage.suspend()
        try:
            story.overwrite()
            story.wait_until_lost()
            for _ in range(8):
                story.overwrite()
            story.expect_lost("corrupted", "ETIMEDOUT")
            story.load.wait_for_round()
            story.load.wait_for_round()
            story.expect_healthy()
        finally:
            storage.resume()


@needs_dm
def test_a_device_that_never_answers_under_many_large_writes_takes_no_other_snapshot_with_it(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    """More writes wait for it than there is memory for copies; the other snapshot needs some too."""
    with ExitStack() as stack:
        storage, _ = stack.enter_context(mapped_storage(folder))
        story = stack.enter_context(lost_storage(daemon, client, folder, way, storage.path))
        storage.suspend()
        stack.callback(storage.resume)
        fio_verify(
            story.disk.path,
            *("--ioengine=libaio", "--iodepth=64", f"--offset={LOADED}", "--bsrange=64k-1m", "--numjobs=1"),
            size=f"{SIZE - LOADED - MIB}",
        )
        story.wait_until_lost()
        story.expect_healthy()
        storage.resume()


# Other bytes than those that were written


@needs_flakey
@pytest.mark.parametrize("fault", ["1 drop_writes", "5 corrupt_bio_byte 33 w 85 0", "5 corrupt_bio_byte 33 r 85 0"])
def test_a_device_that_lies(daemon: OwnDaemon, client: Client, folder: Path, way: str, fault: str) -> None:
    """Writes that get lost, bytes that change on the way there or back: seen when they are read, never delivered."""
    with mapped_storage(folder) as (storage, base), lost_storage(daemon, client, folder, way, storage.path) as story:
        storage.load(f"0 {SECTORS} flakey {base} 0 0 1 {fault}")
        story.overwrite()
        story.load.wait_for_round()
        assert story.disk.state_of(story.suspect) == "active"
        assert story.read_image() > 0
        story.expect_lost("corrupted", "EBADMSG")


@needs_dm
@pytest.mark.parametrize("kind", ["other bytes", "one bit", "swapped", "moved"])
def test_bytes_that_change_beneath(daemon: OwnDaemon, client: Client, folder: Path, way: str, kind: str) -> None:
    """Behind the back of the device that holds them, while fio writes and the image is read."""
    with mapped_storage(folder) as (storage, base), lost_storage(daemon, client, folder, way, storage.path) as story:
        story.overwrite()
        used = story.show().storage.used // UNIT * UNIT
        before = read_at(base, 0, used)
        write_at(base, 0, ALTERED[kind](before))
        assert story.read_image() > 0
        story.expect_lost("corrupted", "EBADMSG")


def _with_one_bit_changed(data: bytes) -> bytes:
    changed = bytearray(data)
    for place in range(0, len(data), UNIT):
        changed[place + 100] ^= 4
    return bytes(changed)


def _with_neighbours_swapped(data: bytes) -> bytes:
    places = [data[start : start + UNIT] for start in range(0, len(data), UNIT)]
    places[0:-1:2], places[1::2] = places[1::2], places[0:-1:2]
    return b"".join(places)


ALTERED: dict[str, Callable[[bytes], bytes]] = {
    "other bytes": lambda data: os.urandom(len(data)),
    "one bit": _with_one_bit_changed,
    "swapped": _with_neighbours_swapped,
    "moved": lambda data: data[512:] + data[:512],
}
