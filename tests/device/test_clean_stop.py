# SPDX-License-Identifier: MIT
"""Change maps outlive a clean stop, and are used again only where nobody can have written to the origin meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.cbt import saved_file
from blksnap_ublk.client import Client
from blksnap_ublk.host import blockdev
from demo import blocks
from tests.direct_io import write_at
from tests.loop_devices import loop_device, run
from tests.own_daemon import OwnDaemon

MIB = 1 << 20
SIZE = 32 * MIB
SIZES = {"xfs": 320 * MIB, "btrfs": 128 * MIB}
"""The least that they take."""

KINDS = {"ext4": ("mkfs.ext4", "-qF"), "xfs": ("mkfs.xfs", "-qf"), "btrfs": ("mkfs.btrfs", "-qf")}


@pytest.fixture
def origin(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    kind = request.node.callspec.params.get("kind", "") if hasattr(request.node, "callspec") else ""
    with loop_device(folder / "disk", SIZES.get(kind, SIZE)) as path:
        yield path


@pytest.fixture
def ext4(origin: str) -> str:
    run(*KINDS["ext4"], origin)
    return origin


@contextmanager
def mounted(device: str, at: Path, options: str = "rw") -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    run("mount", "-o", options, device, str(at))
    try:
        yield at
    finally:
        run("umount", str(at))


class Backup:
    """A copy of an origin, brought from snapshot to snapshot by the reported changes alone."""

    def __init__(self, client: Client, origin: str, folder: Path) -> None:
        self.client = client
        self.origin = origin
        self.folder = folder
        self.size = blockdev.describe(origin).size
        self.copy = folder / "copy"
        self.cursor = ""
        self.attached: list[forms.Device] = []
        self.told: list[str] = []

    def attach(self, *, trust: bool = False, tracking_block: int | None = None) -> str:
        self.told.clear()
        with Client(self.client.path, start=False, warn=self.told.append) as client:
            device = client.attach(self.origin, trust_offline=trust, tracking_block=tracking_block)
        self.attached.append(device)
        return device.device

    def detach(self) -> None:
        self.client.detach(self.attached[-1].device)

    def full(self) -> None:
        with self._snapshot() as snapshot:
            image = snapshot.images[0]
            blocks.full_copy(image.image, self.size, self.copy)
            self.cursor = image.cursor

    def increment(self) -> forms.Changes:
        """Brings the copy up to a snapshot of now, and compares the whole of it."""
        with self._snapshot() as snapshot:
            image = snapshot.images[0]
            changes = self.client.changes(self.origin, since=self.cursor, until=snapshot.id)
            ranges = [(int(start), int(length)) for start, length in changes.ranges]
            blocks.apply(image.image, ranges, self.copy)
            different = blocks.first_difference(image.image, self.size, self.copy)
            assert different is None, f"the MiB at {different} was not reported as changed"
            self.cursor = image.cursor
            return forms.Changes(
                device=self.origin,
                since=None,
                until=image.cursor,
                tracking_block=changes.tracking_block,
                all=changes.all,
                reason=changes.reason,
                changed_bytes=changes.changed_bytes,
                ranges=[],
            )

    @contextmanager
    def _snapshot(self) -> Iterator[forms.Snapshot]:
        snapshot = self.client.create_snapshot([self.origin], storage=[str(self.folder)], limit=self.size)
        try:
            yield snapshot
        finally:
            self.client.destroy_snapshots([snapshot.id])


@pytest.fixture
def backup(client: Client, origin: str, folder: Path) -> Iterator[Backup]:
    made = Backup(client, origin, folder)
    yield made
    for device in client.list_devices():
        client.detach(device.device, force=True)


def write_file(device: str, folder: Path, name: str) -> None:
    with mounted(device, folder / "mounted") as directory:
        (directory / name).write_bytes(b"x" * MIB)


@pytest.mark.parametrize("kind", KINDS)
def test_cursor_is_answered_exactly_over_a_detach(backup: Backup, folder: Path, kind: str) -> None:
    if not shutil.which(KINDS[kind][0]):
        pytest.skip(f"no {KINDS[kind][0]}")
    if kind not in Path("/proc/filesystems").read_text():
        pytest.skip(f"this kernel has no {kind}")
    run(*KINDS[kind], backup.origin)
    device = backup.attach()
    write_file(device, folder, "before the full backup")
    backup.full()
    write_file(device, folder, "before the detach")
    backup.detach()
    device = backup.attach()
    assert not backup.told
    assert backup.attached[1].generation == backup.attached[0].generation
    assert backup.attached[1].change_number == 1
    write_file(device, folder, "after the detach")
    changes = backup.increment()
    assert not changes.all
    assert 2 * MIB <= changes.changed_bytes < backup.size / 2
    # once more, with nothing in between
    backup.detach()
    backup.attach()
    changes = backup.increment()
    assert not changes.all
    assert changes.changed_bytes == 0
    backup.detach()


def mount_for_writing(origin: str, folder: Path) -> None:
    with mounted(origin, folder / "mounted"):
        pass


def write_raw(origin: str, folder: Path) -> None:
    write_at(origin, SIZE - MIB, b"w" * 4096)


def label(origin: str, folder: Path) -> None:
    run("tune2fs", "-L", "other", origin)


def check(origin: str, folder: Path) -> None:
    run("e2fsck", "-fy", origin)


def trim(origin: str, folder: Path) -> None:
    run("blkdiscard", "--offset", str(SIZE - MIB), "--length", "65536", origin)


@pytest.mark.parametrize("meddle", [mount_for_writing, write_raw, label, check, trim])
def test_all_has_changed_when_somebody_wrote_meanwhile(backup: Backup, ext4: str, folder: Path, meddle: object) -> None:
    backup.attach()
    backup.full()
    backup.detach()
    assert callable(meddle)
    meddle(ext4, folder)
    backup.attach()
    assert backup.attached[1].generation != backup.attached[0].generation
    assert any("written to meanwhile" in text and "--trust-offline" in text for text in backup.told)
    changes = backup.increment()
    assert changes.all
    assert changes.reason == "unclean"
    # from here on it is known again
    write_at(backup.attached[1].device, SIZE - MIB, b"y" * 4096)
    assert not backup.increment().all
    backup.detach()


def test_reading_the_origin_meanwhile_does_no_harm(backup: Backup, ext4: str, folder: Path) -> None:
    backup.attach()
    backup.full()
    backup.detach()
    with mounted(ext4, folder / "mounted", "ro"):
        list((folder / "mounted").iterdir())
    backup.attach()
    assert not backup.increment().all
    backup.detach()


def test_without_a_file_system_the_user_must_vouch(backup: Backup) -> None:
    """What is on the origin shows nothing then."""
    device = backup.attach()
    backup.full()
    write_at(device, 5 * MIB, b"a" * 4096)
    backup.detach()
    device = backup.attach(trust=True)
    write_at(device, 7 * MIB, b"b" * 4096)
    changes = backup.increment()
    assert (changes.all, changes.changed_bytes) == (False, 2 * 65536)
    backup.detach()
    backup.attach()
    changes = backup.increment()
    assert (changes.all, changes.reason) == (True, "unclean")
    backup.detach()


def test_a_clean_end_of_the_daemon_saves_what_it_detaches(
    daemon: OwnDaemon, backup: Backup, ext4: str, folder: Path
) -> None:
    device = backup.attach()
    backup.full()
    write_file(device, folder, "file")
    daemon.end()
    daemon.start()
    backup.client.close()
    backup.attach()
    changes = backup.increment()
    assert not changes.all
    assert changes.changed_bytes >= MIB
    backup.detach()


def saved_files(daemon: OwnDaemon) -> Sequence[Path]:
    return sorted((daemon.runtime / "saved").glob("*.changes"))


def test_a_map_is_used_once(daemon: OwnDaemon, backup: Backup, ext4: str, folder: Path) -> None:
    """After a crash what was saved before the last attach is not taken for good: a mark stands in its place."""
    known = set(saved_files(daemon))
    backup.attach()
    (path,) = set(saved_files(daemon)) - known
    backup.full()
    backup.detach()
    saved = saved_file.read(path)
    assert saved is not None
    assert saved.history is not None
    backup.attach()
    mark = path.read_bytes()
    saved = saved_file.read(path)
    assert saved is not None
    assert saved.history is None
    backup.detach()
    # as if the machine had crashed instead of the detach
    path.write_bytes(mark)
    for trust in (False, True):
        backup.attach(trust=trust)
        assert any("not detached" in text for text in backup.told)
        changes = backup.increment()
        assert (changes.all, changes.reason) == (True, "unclean")
        backup.detach()
        path.write_bytes(mark)
        backup.cursor = f"{saved.generation}:1"


def test_other_tracking_blocks(backup: Backup, ext4: str) -> None:
    """Those of the saved map are used where none are asked for."""
    backup.attach(tracking_block=128 << 10)
    backup.full()
    backup.detach()
    backup.attach()
    assert backup.attached[1].tracking_block == 128 << 10
    assert not backup.increment().all
    backup.detach()
    backup.attach(tracking_block=256 << 10)
    assert backup.attached[2].tracking_block == 256 << 10
    changes = backup.increment()
    assert (changes.all, changes.reason) == (True, "tracking-block")
    backup.detach()
    backup.attach(tracking_block=4096)
    backup.increment()
    backup.detach()
    backup.client.attach(backup.origin, unit=8192)  # no tracking block is smaller than that
    changes = backup.increment()
    assert (changes.all, changes.reason, changes.tracking_block) == (True, "tracking-block", 64 << 10)
    backup.detach()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_map(daemon: OwnDaemon, backup: Backup, ext4: str, damage: str) -> None:
    known = set(saved_files(daemon))
    backup.attach()
    backup.full()
    backup.detach()
    (path,) = set(saved_files(daemon)) - known
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-3], "flipped": bytes([whole[0] ^ 64]) + whole[1:], "empty": b""}[damage])
    backup.attach(trust=True)
    assert backup.told
    assert backup.increment().all
    backup.detach()
