# SPDX-License-Identifier: MIT
"""Images are written to: file systems replay their journals in them; nobody but the image sees what it was given."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from demo import blocks
from tests.direct_io import errno_of_write, read_at, write_at
from tests.filtered import Filtered, filtered
from tests.fio import fio_verify
from tests.fio_load import fio_load
from tests.loop_devices import loop_device, mounted, run
from tests.mounted_image import check, mounted_image
from tests.own_daemon import PATIENCE, wait_until

MIB = 1 << 20
SIZE = 8 * MIB
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
"""The smallest that mkfs makes without complaint."""
AT_ONCE = 32
"""Files of the busy writer that exist at any time."""

kinds = pytest.mark.parametrize("kind", ["ext4", "xfs"])

# Makes a file, lets it reach the disk, renames it, deletes an old one; says which numbers are safe.
BUSY = f"""
import os, sys
top, said = sys.argv[1:]
said = os.open(said, os.O_WRONLY | os.O_CREAT)
directory = os.open(top, os.O_RDONLY)
n = 0
while True:
    n += 1
    with open(top + "/coming", "wb", 0) as file:
        file.write(b"%016d" % n * (1 + n * 37 % 3000))
        os.fsync(file.fileno())
    os.rename(top + "/coming", top + "/%d" % n)
    if n > {AT_ONCE}:
        os.unlink(top + "/%d" % (n - {AT_ONCE}))
    os.fsync(directory)
    os.pwrite(said, b"%016d" % n, 0)
"""


class Busy:
    """A process that changes the tree `top` all the time."""

    def __init__(self, top: Path, folder: Path) -> None:
        self._said = folder / "said"
        self.process = subprocess.Popen([sys.executable, "-S", "-c", BUSY, str(top), str(self._said)])

    def safe(self) -> int:
        """The number of the last file that is on the disk for good."""
        return int(self._said.read_text() or 0) if self._said.exists() else 0


@contextmanager
def busy(top: Path, folder: Path) -> Iterator[Busy]:
    """It has deleted files when the block begins."""
    writer = Busy(top, folder)
    try:
        wait_until("files are deleted", lambda: writer.safe() > AT_ONCE + 8)
        yield writer
        assert writer.process.poll() is None, "the busy writer has ended"
    finally:
        writer.process.kill()
        writer.process.wait(PATIENCE)


def expect_files(top: Path, safe: int) -> None:
    """All that was safe is there, or what came after it; every file is whole."""
    there = {int(path.name) for path in top.iterdir() if path.name.isdecimal()}
    last = max(there)
    assert safe <= last, (safe, sorted(there))
    # The last one may be renamed already while the oldest is not deleted yet.
    assert there >= set(range(last - AT_ONCE + 1, last + 1)), (safe, sorted(there))
    for n in there:
        assert (top / str(n)).read_bytes() == b"%016d" % n * (1 + n * 37 % 3000), f"file {n}"


def needs_replay(kind: str, device: str) -> bool:
    """Whether there is a journal that the next mount must replay."""
    if kind == "ext4":
        return "needs_recovery" in run("dumpe2fs", "-h", device)
    done = subprocess.run(["xfs_repair", "-n", device], capture_output=True, text=True, check=False)
    return "valuable metadata changes in a log" in done.stdout + done.stderr


def take(disk: Filtered, storage: str | Path, limit: int | None = None) -> forms.Snapshot:
    """As after a crash: nothing is frozen."""
    return disk.client.create_snapshot([disk.path], storage=[str(storage)], limit=limit, freeze=forms.Freeze.NO)


@kinds
def test_journals_are_replayed(client: Client, folder: Path, way: str, kind: str) -> None:
    """Under load; then what is done in the image stays in it, and in none of the same instant."""
    if not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"no mkfs.{kind}")
    with loop_device(folder / "origin", SIZES[kind]) as origin, filtered(client, origin, way, folder) as disk:
        with mounted(disk.path, folder / "data", kind) as top:
            with busy(top, folder) as writer:
                safe = writer.safe()
                first = take(disk, folder, 128 * MIB)
                image = first.images[0].image
                assert needs_replay(kind, image)
                with mounted_image(kind, image, folder / "image") as inside:
                    expect_files(inside, safe)
                    for path in list(inside.glob("[0-9]*"))[::2]:
                        path.unlink()
                    (inside / "of the image").write_bytes(os.urandom(3 * MIB))
                    run("sync", "-f", str(inside))
                    assert not (top / "of the image").exists()
                check(kind, image)
                assert writer.safe() > safe
            expect_files(top, writer.safe())
        check(kind, disk.path)
        before = blocks.sha256(disk.path, disk.size)
        # Two of one instant: nobody writes.
        second, third = take(disk, f"@{first.id}"), take(disk, f"@{first.id}")
        with (
            mounted_image(kind, second.images[0].image, folder / "second") as one,
            mounted_image(kind, third.images[0].image, folder / "third") as other,
        ):
            contents = {place: os.urandom(2 * MIB) for place in (one, other)}
            for place, content in contents.items():
                (place / "its own").write_bytes(content)
                run("sync", "-f", str(place))
            run("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
            for place, content in contents.items():
                assert (place / "its own").read_bytes() == content
                assert not (place / "of the image").exists()
        for snapshot in (first, second, third):
            check(kind, snapshot.images[0].image)
            assert disk.state_of(snapshot) == "active"
        with mounted_image(kind, image, folder / "image") as inside:
            assert (inside / "of the image").exists()
            assert not (inside / "its own").exists()
        assert blocks.sha256(disk.path, disk.size) == before
        assert blocks.sha256(origin, disk.size) == before


def fill(disk: Filtered) -> bytes:
    content = os.urandom(disk.size)
    for start in range(0, disk.size, MIB):
        write_at(disk.path, start, content[start : start + MIB])
    return content


def test_image_and_origin_are_written_at_once(client: Client, folder: Path, way: str) -> None:
    """The same units, in part and whole; each has what it was given, and an older and a younger image neither."""
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        fill(disk)
        copy = disk.copy()
        older = take(disk, folder, 8 * SIZE)
        written, younger = take(disk, f"@{older.id}"), take(disk, f"@{older.id}")
        image = written.images[0].image
        with fio_load(disk.path, "--bsrange=512-64k", size="4m") as load:
            for seed in range(3):
                fio_verify(
                    image,
                    *("--ioengine=libaio", "--iodepth=16", "--bsrange=512-64k", "--allow_file_create=0"),
                    size="4m",
                    seed=seed,
                )
            load.wait_for_round()
        # What fio did not write to is as it was.
        half = SIZE // 2
        assert read_at(image, half, half) == copy.read_bytes()[half:]
        for snapshot in (older, younger):
            disk.expect_equal(snapshot.images[0].image, copy)
        kept = blocks.sha256(image, SIZE)
        client.destroy_snapshots([younger.id])
        client.destroy_snapshots([older.id])
        assert blocks.sha256(image, SIZE) == kept
        disk.expect_equal(origin, disk.copy("now"))


def test_parts_of_units(client: Client, folder: Path, way: str) -> None:
    """A write of a sector to a unit that only the origin has, that is preserved, that the image has; and zeroes."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        model = bytearray(fill(disk))
        snapshot = take(disk, folder, 3 * SIZE)
        image = snapshot.images[0].image
        for _ in range(150):
            start = dice.randrange(256) * 512
            length = dice.randrange(1, 20) * 512
            data = dice.randbytes(length)
            what = dice.random()
            if what < 0.5:
                write_at(image, start, data)
                model[start : start + length] = data
            elif what < 0.6:
                run("blkdiscard", "--zeroout", "--offset", str(start), "--length", str(length), image)
                model[start : start + length] = bytes(length)
            else:
                write_at(disk.path, start, data)
        assert read_at(image, 0, MIB) == model[:MIB]
        expected = hashlib.sha256(model).hexdigest()
        assert blocks.sha256(image, SIZE) == expected
        assert disk.state_of(snapshot) == "active"


def test_changes_tell_what_was_written_to_an_image(client: Client, folder: Path, way: str) -> None:
    """In the interval that ends with the image and in the one after it; those further away know nothing of it."""
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        fill(disk)
        first = take(disk, folder, 8 * SIZE)
        snapshots = [first, *(take(disk, f"@{first.id}") for _ in range(3))]
        block = client.list_devices()[0].tracking_block

        def reported(since: int, until: int) -> set[int]:
            changes = client.changes(disk.path, since=snapshots[since].images[0].cursor, until=snapshots[until].id)
            assert not changes.all, changes.reason
            return {
                at // block for start, length in changes.ranges for at in range(int(start), int(start + length), block)
            }

        assert [reported(n, n + 1) for n in range(3)] == [set(), set(), set()]
        write_at(snapshots[1].images[0].image, 5 * block + 512, os.urandom(512))
        write_at(snapshots[1].images[0].image, 9 * block - 4096, os.urandom(8192))
        assert [reported(n, n + 1) for n in range(3)] == [{5, 8, 9}, {5, 8, 9}, set()]
        # Of the newest: the interval after it is not over yet.
        write_at(snapshots[3].images[0].image, 20 * block, os.urandom(512))
        write_at(disk.path, 30 * block, os.urandom(512))
        assert reported(2, 3) == {20}
        snapshots.append(take(disk, f"@{first.id}"))
        assert reported(3, 4) == {20, 30}
        assert reported(1, 4) == {5, 8, 9, 20, 30}
        # A backup of the image as it was changed, from one of the instant before it.
        copy = folder / "before"
        blocks.full_copy(snapshots[0].images[0].image, SIZE, copy)
        disk.expect_increment(copy, snapshots[0].images[0].cursor, snapshots[1])
        disk.expect_increment(copy, snapshots[1].images[0].cursor, snapshots[2])
        # Ends do not make it forget.
        client.destroy_snapshots([snapshots[1].id])
        assert {5, 8, 9} <= reported(0, 2)


def test_a_full_storage_ends_the_writes_to_an_image_first(client: Client, folder: Path, way: str) -> None:
    """ENOSPC for the image; the snapshot is what it was, and has room for what the origin overwrites."""
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        content = fill(disk)
        storage = folder / "storage"
        with storage.open("wb") as file:
            file.truncate(2 * MIB)
        snapshot = take(disk, storage, limit=2 * MIB)
        image = snapshot.images[0].image
        model = bytearray(content)
        piece = 64 << 10
        results = set()
        for start in range(0, SIZE, piece):
            data = os.urandom(piece)
            results.add(errno_of_write(image, start, data))
            if results == {0}:
                model[start : start + piece] = data
            else:
                break
        assert results == {0, errno.ENOSPC}
        # Of the write that failed, some may be there.
        assert read_at(image, start + piece, SIZE - start - piece) == model[start + piece :]
        assert read_at(image, 0, start) == model[:start]
        write_at(disk.path, SIZE - piece, os.urandom(piece))
        assert disk.state_of(snapshot) == "active"
        assert read_at(image, SIZE - piece, piece) == content[-piece:]
