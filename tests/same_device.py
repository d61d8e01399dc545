# SPDX-License-Identifier: MIT
"""A file system on a filtered device, or on a partition of it, that is to hold difference storage; for tests."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.host import extents
from blksnap_ublk.host.inode_flags import InodeFlags, inode_flags
from demo import blocks
from tests.direct_io import read_at
from tests.filtered import Filtered, filtered
from tests.loop_devices import loop_device, mounted, run
from tests.mounted_image import check, mounted_image
from tests.partitions import make_partitions, partitions_of

MIB = 1 << 20
UNIT = 4096
SIZES = {"ext4": 128 * MIB, "xfs": 384 * MIB}
STORAGE = 48 * MIB


@dataclass
class OnFiltered:
    """The file system `kind` on `node`, mounted at `top`; `start`: where `node` begins on the filtered device."""

    disk: Filtered
    kind: str
    node: str
    start: int
    top: Path

    @property
    def client(self) -> Client:
        return self.disk.client

    def take(
        self, storage: str | Path, limit: int | None = STORAGE, freeze: forms.Freeze = forms.Freeze.TRY
    ) -> forms.Snapshot:
        return self.client.create_snapshot([self.disk.path], storage=[str(storage)], limit=limit, freeze=freeze)

    def image_of(self, snapshot: forms.Snapshot) -> str:
        """The image of `node`."""
        return snapshot.images[0].image

    def runs_of(self, path: Path) -> list[tuple[int, int]]:
        """Where a file lies on the filtered device: (start, length) in bytes, in whole units."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            found = extents.extents(descriptor, 0, os.fstat(descriptor).st_size) or []
        finally:
            os.close(descriptor)
        runs = [(self.start + each.physical, self.start + each.physical + each.length) for each in found]
        whole = [(-(-start // UNIT) * UNIT, end // UNIT * UNIT) for start, end in runs]
        return [(start, end - start) for start, end in whole if end > start]

    def check_image(self, snapshot: forms.Snapshot, files: dict[str, str], number: int = 1) -> None:
        """A copy of the image can be repaired from its journal, holds these files, and passes the file system check."""
        copy = self.disk.folder / "image-copy"
        blocks.full_copy(self.image_of(snapshot), self.disk.size, copy)
        options = [] if self.start == 0 else ["--offset", str(self.start)]
        try:
            with loop_device(copy, None, options) as device:
                with mounted_image(self.kind, device, self.disk.folder / "image") as top:
                    assert checksums(top / f"files{number}") == files
                check(self.kind, device)
        finally:
            copy.unlink()

    def expect_zeroes(self, image: str, runs: list[tuple[int, int]]) -> None:
        """The image reads zeroes there."""
        for start, length in runs:
            for position in range(start, start + length, MIB):
                data = read_at(image, position, min(MIB, start + length - position))
                assert data.count(0) == len(data), f"{image} at {position}"


@contextmanager
def on_filtered(
    client: Client,
    folder: Path,
    kind: str,
    way: str = "copy",
    *,
    partition: bool = False,
    options: str = "rw",
    size: int | None = None,
) -> Iterator[OnFiltered]:
    """A fresh one; unmounted, detached and checked at the end."""
    size = max(size or 0, SIZES[kind])
    with ExitStack() as stack:
        origin = stack.enter_context(loop_device(folder / "origin", size))
        if partition:
            make_partitions(origin, 1, size // MIB - 8)
        disk = stack.enter_context(filtered(client, origin, way, folder))
        node = partitions_of(disk.path)[0] if partition else disk.path
        start = 512 * int((Path("/sys/class/block") / Path(node).name / "start").read_text()) if partition else 0
        with mounted(node, folder / "data", kind, options=options) as top:
            try:
                yield OnFiltered(disk, kind, node, start, top)
            finally:  # their storage keeps the file system from being unmounted
                for snapshot in client.list_snapshots():
                    client.destroy_snapshots([snapshot.id], force=True)
        check(kind, node)


def write_files(top: Path, number: int) -> dict[str, str]:
    """Some files in a directory of their own; their checksums."""
    folder = top / f"files{number}"
    folder.mkdir()
    for name, size in (("empty", 0), ("small", 70_000), ("large", 5_000_000)):
        (folder / name).write_bytes(os.urandom(size))
    run("sync", "-f", str(top))
    return checksums(folder)


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def is_immutable(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return bool(inode_flags(descriptor) & InodeFlags.IMMUTABLE)
    finally:
        os.close(descriptor)


def free(top: Path) -> int:
    """Bytes that the file system has left, once it has done what it puts off."""
    run("sync", "-f", str(top))
    status = os.statvfs(top)
    return status.f_bfree * status.f_frsize


def refuses(*command: str) -> bool:
    """Whether a command ends with an error."""
    return subprocess.run(command, capture_output=True).returncode != 0
