# SPDX-License-Identifier: MIT
"""Difference storage that begins small keeps up with writers at full speed: ten parts are overwritten, and it may grow
from a sixteenth of one to twelve.

A part is 16 MiB. With `BSU_FULL_SPEED_MIB=10240` ten parts are 10 GiB, the beginning is 64 MiB and the limit 12 GiB;
`BSU_FULL_SPEED_DIRECTORY` is where the disks are made: it needs room for 23 parts, on a file system with sparse files.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from demo import blocks
from tests.direct_io import write_at
from tests.filtered import filtered, granted_ways
from tests.fio import fio_verify
from tests.loop_devices import loop_device, mounted, run
from tests.mounted_image import mounted_image

MIB = 1 << 20
OVERWRITTEN = int(os.environ.get("BSU_FULL_SPEED_MIB", "160")) * MIB
BEGINNING = OVERWRITTEN // 160
LIMIT = OVERWRITTEN // 10 * 12
SPARE = max(OVERWRITTEN // 10, 64 * MIB)
"""For what a file system needs beside its files."""
ONE_WAY = granted_ways()[-1]


@pytest.fixture
def large(folder: Path) -> Iterator[Path]:
    """A directory for the disks."""
    directory = os.environ.get("BSU_FULL_SPEED_DIRECTORY")
    if directory is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=directory) as path:
        yield Path(path)


def fill(path: str, size: int) -> None:
    for start in range(0, size, MIB):
        write_at(path, start, os.urandom(MIB))


def overwrite(path: str, *options: str) -> None:
    """As fast as fio can, and then all of it verified."""
    fio_verify(path, "--ioengine=libaio", "--iodepth=32", *options, size=str(OVERWRITTEN), limit=1800)


def events_of(client: Client, snapshot: forms.Snapshot) -> list[str]:
    return [event.type for event in client.events(snapshot=snapshot.id)]


PATTERNS = {
    "sequential": ("--rw=write", "--bsrange=1m-1m"),
    "random": ("--rw=randwrite", "--bsrange=4k-256k"),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_grows_ahead_of_the_writers(client: Client, folder: Path, large: Path, kind: str, pattern: str) -> None:
    with ExitStack() as stack:
        origin = stack.enter_context(loop_device(large / "origin", OVERWRITTEN))
        base = stack.enter_context(loop_device(large / "base", max(LIMIT + SPARE, 320 * MIB)))
        files = stack.enter_context(mounted(base, folder / "files", kind))
        disk = stack.enter_context(filtered(client, origin, ONE_WAY, folder))
        fill(disk.path, disk.size)
        before = blocks.sha256(disk.path, disk.size)
        storage = files / "storage"
        storage.write_bytes(bytes(BEGINNING))
        snapshot = client.create_snapshot([disk.path], storage=[str(storage)], limit=LIMIT)
        assert snapshot.storage.capacity == BEGINNING
        overwrite(disk.path, *PATTERNS[pattern])
        shown = client.show_snapshot(snapshot.id)
        assert (shown.state.value, shown.error) == ("active", None)
        assert OVERWRITTEN <= shown.storage.used <= shown.storage.capacity <= LIMIT
        assert blocks.sha256(snapshot.images[0].image, disk.size) == before
        told = events_of(client, snapshot)
        assert "storage-grown" in told
        assert "overflow" not in told
        disk.destroy(snapshot)
        assert storage.stat().st_size == BEGINNING


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_storage_on_the_snapshotted_file_system_itself(client: Client, folder: Path, large: Path, kind: str) -> None:
    """All twelve parts are reserved before the instant; the file that is overwritten lies beside them."""
    with ExitStack() as stack:
        origin = stack.enter_context(loop_device(large / "origin", OVERWRITTEN + LIMIT + 2 * SPARE + 256 * MIB))
        disk = stack.enter_context(filtered(client, origin, ONE_WAY, folder))
        files = stack.enter_context(mounted(disk.path, folder / "files", kind))
        data = files / "data"
        with data.open("wb") as file:
            for _ in range(OVERWRITTEN // MIB):
                file.write(os.urandom(MIB))
        before = _sha256(data)
        snapshot = client.create_snapshot([disk.path], storage=[str(files)], limit=LIMIT)
        assert snapshot.storage.capacity <= LIMIT
        overwrite(str(data), *PATTERNS["sequential"])
        shown = client.show_snapshot(snapshot.id)
        assert (shown.state.value, shown.error) == ("active", None)
        assert shown.storage.used >= OVERWRITTEN
        with mounted_image(kind, snapshot.images[0].image, folder / "image") as image:
            assert _sha256(image / "data") == before
        disk.destroy(snapshot)
        run("sync", "--file-system", str(files))
        assert os.listdir(files) == [name for name in os.listdir(files) if name in ("data", "lost+found")]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
