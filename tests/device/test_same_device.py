# SPDX-License-Identifier: MIT
"""Difference storage on the snapshotted device itself: in files of the file system directly on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import Busy, Failed, Unsupported, UsageError
from demo import blocks
from tests.filtered import filtered
from tests.fio import fio_verify
from tests.loop_devices import loop_device, mounted, run
from tests.mounted_image import mounted_image
from tests.own_daemon import wait_until
from tests.same_device import (
    MIB,
    STORAGE,
    checksums,
    free,
    is_immutable,
    on_filtered,
    refuses,
    write_files,
)

KIB = 1 << 10
kinds = pytest.mark.parametrize("kind", ["ext4", "xfs"])


@kinds
@pytest.mark.parametrize("partition", [False, True], ids=["whole", "partition"])
def test_a_file_system_holds_the_storage_of_its_own_snapshot(
    client: Client, folder: Path, way: str, kind: str, partition: bool
) -> None:
    """The space of a large file that was deleted a moment ago becomes storage; then all is overwritten under fio."""
    if not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"no mkfs.{kind}")
    with on_filtered(client, folder, kind, way, partition=partition) as on:
        files = write_files(on.top, 1)
        fio_verify(str(on.top / "fio"), size="16m")
        (on.top / "large").write_bytes(b"large" * (12 * MIB))
        before = free(on.top)
        (on.top / "large").unlink()
        snapshot = on.take(on.top)
        image = on.image_of(snapshot)
        assert snapshot.frozen
        assert STORAGE - 2 * MIB <= snapshot.storage.capacity <= STORAGE
        copy = folder / "copy"
        blocks.full_copy(image, on.disk.size, copy)
        for seed in (2, 3):
            fio_verify(str(on.top / "fio"), size="16m", seed=seed)
        second = write_files(on.top, 2)
        shutil.rmtree(on.top / "files1")
        now = client.show_snapshot(snapshot.id)
        assert now.state.value == "active", now.error
        assert 8 * MIB < now.storage.used < STORAGE
        on.disk.expect_equal(image, copy)
        copy.unlink()
        on.check_image(snapshot, files)
        client.destroy_snapshots([snapshot.id])
        assert checksums(on.top / "files2") == second
        assert free(on.top) > before


@kinds
def test_what_becomes_storage_and_what_was_counts_as_changed(client: Client, folder: Path, kind: str) -> None:
    """A backup kept up by increments alone equals the image each time: before, with, and after the storage."""
    with on_filtered(client, folder, kind) as on:
        first = on.disk.snapshot(folder)
        backup = folder / "backup"
        blocks.full_copy(on.image_of(first), on.disk.size, backup)
        on.disk.destroy(first)
        write_files(on.top, 1)
        second = on.take(on.top / "storage")
        runs = on.runs_of(on.top / "storage")
        changes = on.disk.expect_increment(backup, first.images[0].cursor, second)
        for start, length in runs:
            assert any(s <= start and start + length <= s + n for s, n in changes.ranges), (start, length)
        on.expect_zeroes(on.image_of(second), runs)
        fio_verify(str(on.top / "fio"), size="16m")
        third = on.take(f"@{second.id}", limit=None)
        on.disk.expect_increment(backup, second.images[0].cursor, third)
        on.expect_zeroes(on.image_of(third), runs)
        write_files(on.top, 2)
        client.destroy_snapshots([second.id, third.id])
        assert not (on.top / "storage").exists()
        fourth = on.disk.snapshot(folder)
        on.disk.expect_increment(backup, third.images[0].cursor, fourth)
        backup.unlink()


@kinds
def test_snapshots_with_and_without_that_storage(client: Client, folder: Path, kind: str) -> None:
    """One shares it, one has storage elsewhere; the latter outlives it, and the blocks belong to other files then."""
    with on_filtered(client, folder, kind) as on:
        files = write_files(on.top, 1)
        first = on.take(on.top / "storage")
        runs = on.runs_of(on.top / "storage")
        fio_verify(str(on.top / "fio"), size="8m")
        shared = on.take(f"@{first.id}", limit=None)
        fio_verify(str(on.top / "fio"), size="8m", seed=2)
        elsewhere = on.disk.snapshot(folder)
        copies = {}
        for snapshot in (first, shared, elsewhere):
            copies[snapshot.id] = folder / f"copy-{snapshot.id}"
            blocks.full_copy(on.image_of(snapshot), on.disk.size, copies[snapshot.id])
            on.expect_zeroes(on.image_of(snapshot), runs)
        fio_verify(str(on.top / "fio"), size="8m", seed=3)
        for snapshot in (first, shared, elsewhere):
            on.disk.expect_equal(on.image_of(snapshot), copies[snapshot.id])
        client.destroy_snapshots([first.id])
        write_files(on.top, 2)
        on.disk.expect_equal(on.image_of(shared), copies[shared.id])
        client.destroy_snapshots([shared.id])
        assert not (on.top / "storage").exists()
        with (on.top / "filler").open("wb") as file:
            for _ in range(free(on.top) // MIB - 24):
                file.write(b"filler.." * (MIB // 8))
        free(on.top)
        filled = on.runs_of(on.top / "filler")
        assert any(s < start + length and start < s + n for s, n in filled for start, length in runs)
        on.disk.expect_equal(on.image_of(elsewhere), copies[elsewhere.id])
        on.check_image(elsewhere, files)
        client.destroy_snapshots([elsewhere.id])
        for copy in copies.values():
            copy.unlink()


@kinds
def test_nearly_all_of_it_is_used_at_full_speed(client: Client, folder: Path, kind: str) -> None:
    """Three quarters of what is reserved are overwritten; `BSU_SAME_DEVICE_MIB` in the environment reserves more.

    An eighth is kept for copies, and mounting an image of ext4 writes to it: its orphans are cleaned up.
    """
    reserved = int(os.environ.get("BSU_SAME_DEVICE_MIB", "192")) * MIB
    data = reserved // 4 * 3 // MIB
    with on_filtered(client, folder, kind, size=2 * reserved + 256 * MIB) as on:
        with (on.top / "fio").open("wb") as file:
            for _ in range(data):
                file.write(b"before.." * (MIB // 8))
        before = free(on.top)
        files = write_files(on.top, 1)
        snapshot = on.take(on.top, limit=reserved)
        fio_verify(str(on.top / "fio"), "--rw=write", "--bsrange=1m-1m", "--overwrite=1", size=f"{data}m")
        now = client.show_snapshot(snapshot.id)
        assert (now.state.value, now.error) == ("active", None)
        assert data * MIB <= now.storage.used <= reserved
        with mounted_image(kind, on.image_of(snapshot), folder / "image") as image:
            assert checksums(image / "files1") == files
            with (image / "fio").open("rb") as file:
                for n in range(data):
                    assert file.read(MIB) == b"before.." * (MIB // 8), f"the MiB {n}"
        client.destroy_snapshots([snapshot.id])
        # xfs gives back in the background.
        wait_until("the space is free again", lambda: free(on.top) > before - 8 * MIB)


@kinds
def test_trims_never_reach_the_storage(client: Client, folder: Path, kind: str) -> None:
    """Mounted with discard: what is trimmed under a snapshot is remembered, and forgotten where storage is made."""
    with on_filtered(client, folder, kind, options="discard") as on:
        (on.top / "large").write_bytes(b"large" * (12 * MIB))
        free(on.top)
        first = on.disk.snapshot(folder)
        (on.top / "large").unlink()
        free(on.top)
        run("fstrim", str(on.top))
        client.destroy_snapshots([first.id])
        files = write_files(on.top, 1)
        snapshot = on.take(on.top)
        copy = folder / "copy"
        blocks.full_copy(on.image_of(snapshot), on.disk.size, copy)
        for seed in (1, 2):
            fio_verify(str(on.top / "fio"), size="16m", seed=seed)
            (on.top / "fio").unlink()
            run("fstrim", str(on.top))
        elsewhere = on.disk.snapshot(folder)
        client.destroy_snapshots([elsewhere.id])
        on.disk.expect_equal(on.image_of(snapshot), copy)
        copy.unlink()
        on.check_image(snapshot, files)


def test_storage_for_a_snapshot_of_another_device(client: Client, folder: Path) -> None:
    """It lies beneath a device that is no member; images of that one are exempt from it all the same."""
    with (
        on_filtered(client, folder, "ext4") as on,
        loop_device(folder / "other", 32 * MIB) as origin,
        filtered(client, origin, "copy", folder) as other,
    ):
        fio_verify(other.path, size="16m")
        copy = other.copy("other-copy")
        storage = on.top / "storage"
        snapshot = client.create_snapshot([other.path], storage=[str(storage)], limit=STORAGE)
        runs = on.runs_of(storage)
        fio_verify(other.path, size="24m", seed=2)
        assert client.show_snapshot(snapshot.id).storage.used >= 16 * MIB
        mine = on.disk.snapshot(folder)
        on.expect_zeroes(on.image_of(mine), runs)
        other.expect_equal(snapshot.images[0].image, copy)
        with pytest.raises(Unsupported, match=f"has snapshot {mine.id}"):
            client.create_snapshot([other.path], storage=[str(on.top)], limit=MIB)
        with pytest.raises(Busy, match="in use by snapshot"):
            client.detach(on.disk.path)
        client.destroy_snapshots([mine.id])
        with pytest.raises(Busy, match=f"holds the difference storage of snapshot {snapshot.id}"):
            client.detach(on.disk.path)
        other.expect_equal(snapshot.images[0].image, copy)
        client.destroy_snapshots([snapshot.id])
        assert not storage.exists()


def test_a_file_that_was_there_gets_its_size_and_freedom_back(client: Client, folder: Path) -> None:
    with on_filtered(client, folder, "ext4") as on:
        path = on.top / "file"
        path.write_bytes(os.urandom(4 * MIB))
        with pytest.raises(UsageError, match="all ranges of a file as one SPEC"):
            client.create_snapshot([on.disk.path], storage=[f"{path}:0+8", f"{path}:16+8"])
        snapshot = on.take(path, limit=None)
        assert 4 * MIB - 64 * KIB <= snapshot.storage.capacity <= 4 * MIB
        assert {area.path for area in snapshot.storage.areas} == {str(path)}
        assert is_immutable(path)
        assert refuses("rm", "-f", str(path))
        with pytest.raises(Busy, match="holds the storage of another snapshot"):
            client.create_snapshot([on.disk.path], storage=[str(path)])
        client.destroy_snapshots([snapshot.id])
        assert not is_immutable(path)
        snapshot = on.take(path, limit=8 * MIB)
        assert path.stat().st_size == 8 * MIB
        client.destroy_snapshots([snapshot.id])
        assert path.stat().st_size == 4 * MIB
        path.unlink()


def test_what_is_refused(client: Client, folder: Path) -> None:
    with on_filtered(client, folder, "ext4") as on:
        before = free(on.top)
        with pytest.raises(UsageError, match="give --limit SIZE"):
            on.take(on.top, limit=None)
        with pytest.raises(UsageError, match="give --limit SIZE"):
            on.take(on.top / "missing", limit=None)
        with pytest.raises(Failed, match="no room"):
            on.take(on.top, limit=on.disk.size)
        with pytest.raises(Unsupported, match=f"{on.disk.path}: lies on {on.disk.path}"):
            on.take(on.disk.path, limit=None)
        (on.top / "loop").write_bytes(bytes(16 * MIB))
        with loop_device(on.top / "loop") as loop, mounted(loop, folder / "above") as above:
            with pytest.raises(Unsupported, match="lies on"):
                on.take(above, limit=4 * MIB)
            with pytest.raises(Busy, match=r"is open elsewhere|locked"):
                on.take(on.top / "loop", limit=None)
        (on.top / "loop").unlink()
        with loop_device(folder / "plain", 64 * MIB) as plain, mounted(plain, folder / "above") as above:
            snapshot = on.disk.snapshot(above)
            with pytest.raises(Busy, match=f"{plain}: holds the difference storage of snapshot {snapshot.id}"):
                client.attach(plain)
            client.destroy_snapshots([snapshot.id])
        snapshot = on.disk.snapshot(folder)
        with pytest.raises(Unsupported, match=f"share the storage of a snapshot with --storage @{snapshot.id}"):
            on.take(on.top)
        with pytest.raises(Unsupported, match="lies on"):
            client.add_storage(snapshot.id, [str(on.top)])
        with (
            mounted_image("ext4", on.image_of(snapshot), folder / "image") as image,
            pytest.raises(Unsupported, match=f"lies on {on.image_of(snapshot)}"),
        ):
            on.take(image)
        client.destroy_snapshots([snapshot.id])
        assert free(on.top) == before


def test_detached_by_force(client: Client, folder: Path) -> None:
    """The snapshot whose storage goes with the device is destroyed first; files are given back before that."""
    point = folder / "data"
    with loop_device(folder / "one", 64 * MIB) as one, loop_device(folder / "two", 32 * MIB) as two:
        device = client.attach(one).device
        other = client.attach(two).device
        with mounted(device, point):
            (point / "file").write_bytes(bytes(4 * MIB))
            snapshot = client.create_snapshot([other], storage=[str(point / "file")], limit=8 * MIB)
            fio_verify(other, size="4m")
            with pytest.raises(Busy, match=f"holds the difference storage of snapshot {snapshot.id}"):
                client.detach(device)
            run("umount", "--lazy", str(point))
            client.detach(device, force=True)
        assert client.list_snapshots() == []
        fio_verify(other, size="4m", seed=2)
        client.detach(other)
        with mounted(one, point, mkfs=["-n"]):
            assert not is_immutable(point / "file")
            assert (point / "file").stat().st_size == 4 * MIB
