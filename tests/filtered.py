# SPDX-License-Identifier: MIT
"""A filtered device of a test's daemon, on the data way that the test wants, and what is checked of its images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.client.changed_ranges import ChangedRanges
from blksnap_ublk.host import blockdev
from blksnap_ublk.ublk import Features, granted_features
from blksnap_ublk.ublk.features import ZERO_COPY
from demo import blocks

MIB = 1 << 20


def granted_ways() -> list[str]:
    """The data ways that this kernel has."""
    zero_copy = ZERO_COPY in (granted_features() or Features(0))
    return ["copy", "zero-copy"] if zero_copy else ["copy"]


@dataclass
class Filtered:
    """A filtered device `path` of `size` bytes. `folder` is for copies of it."""

    client: Client
    path: str
    origin: str
    size: int
    folder: Path

    def snapshot(self, storage: str | Path) -> forms.Snapshot:
        """Takes a snapshot of it; `storage` is a SPEC, and a directory is told to give no more than is ever needed."""
        limit = self.size + MIB if Path(storage).is_dir() else None
        return self.client.create_snapshot([self.path], storage=[str(storage)], limit=limit)

    def destroy(self, snapshot: forms.Snapshot) -> None:
        self.client.destroy_snapshots([snapshot.id])

    def state_of(self, snapshot: forms.Snapshot) -> str:
        """`active`, `overflown` or `corrupted`."""
        return self.client.show_snapshot(snapshot.id).state.value

    def copy(self, name: str = "copy") -> Path:
        """What it holds now, as a file."""
        path = self.folder / name
        blocks.full_copy(self.path, self.size, path)
        return path

    def expect_equal(self, device: str, copy: Path) -> None:
        """The device (an image, the origin) holds what the copy holds, byte for byte."""
        different = blocks.first_difference(device, self.size, copy)
        assert different is None, f"{device} differs from {copy.name} in the MiB at {different}"

    def expect_increment(self, copy: Path, since: str, snapshot: forms.Snapshot) -> ChangedRanges:
        """Brings a copy from the cursor `since` up to the snapshot by the reported changes alone, and compares.

        Equal means that the changes missed nothing that is different.
        """
        changes = self.client.changes(self.path, since=since, until=snapshot.id)
        assert not changes.all, changes.reason
        image = snapshot.images[0].image
        blocks.apply(image, [(int(start), int(length)) for start, length in changes.ranges], copy)
        self.expect_equal(image, copy)
        return changes


@contextmanager
def filtered(
    client: Client, origin: str, way: str, folder: Path, *, queues: int | None = None, detach: bool = True
) -> Iterator[Filtered]:
    """Attaches the origin. At the end its snapshots are destroyed, and with `detach` it must be free to be detached.

    An origin that asks for stable pages is served on the copy way: that is how a test gets it.
    """
    (Path("/sys/class/block") / Path(origin).name / "queue/stable_writes").write_text("1" if way == "copy" else "0")
    device = client.attach(origin, queues=queues)
    clean = False
    try:
        assert device.data_path.value == way
        yield Filtered(client, device.device, origin, blockdev.describe(origin).size, folder)
        clean = True
    finally:
        for snapshot in client.list_snapshots():
            if any(image.device == device.device for image in snapshot.images):
                client.destroy_snapshots([snapshot.id], force=not clean)
        if detach or not clean:
            client.detach(device.device, force=not clean)
