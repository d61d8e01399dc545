# SPDX-License-Identifier: MIT
"""A snapshot that breaks is told of once; when and why stays known, whatever becomes of its storage."""

from __future__ import annotations

import errno
import struct
import threading
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from blksnap_ublk import forms
from blksnap_ublk.snapshot import broken, naming, report, state_files
from blksnap_ublk.snapshot.catalogue import (
    AreaEntry,
    Catalogue,
    ImageEntry,
    Phase,
    SnapshotEntry,
    StorageEntry,
)
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.state_files import ImageStatus, StateFiles

UNIT = 4096
MIB = 1 << 20
# As in csrc/core/state.h, of the version that is read.
IMAGE_STATE = struct.Struct("<IIQIIIiQQQ8x")
MAGIC = 0x49555342


def area(path: str, offset: int, length: int, inode: int = 7) -> AreaEntry:
    return AreaEntry(path, "d", (8, 1), inode, offset, length)


STORAGE = StorageEntry(key="s", unit=UNIT, limit=MIB, on_overflow="break", areas=[area("/diff", 0, MIB)])
IMAGE = ImageEntry(
    key="k",
    device="d",
    filtered="/dev/ublkb0",
    origin="/dev/sdb",
    size=1 << 30,
    unit=UNIT,
    serial=1,
    generation="g",
    change_number=1,
    served=None,
)
SNAPSHOT = SnapshotEntry(
    id="0123abcd-0000-4000-8000-000000000001",
    created="2026",
    phase=Phase.ACTIVE,
    frozen=True,
    gate_us=0,
    images=[IMAGE],
    storage_key="s",
)


class Machine:
    """A catalogue and state files, without any process; what was told."""

    def __init__(self, directory: Path) -> None:
        none = cast(Any, None)
        (directory / "state").mkdir(exist_ok=True)
        self.told: list[tuple[str, str]] = []
        self.context = Context(
            io=none,
            keeper=none,
            disks=none,
            state=StateFiles(directory / "state"),
            catalogue=Catalogue(directory / "catalogue"),
            registry=none,
            emit=self._emit,
        )

    def _emit(self, kind: str, *, snapshot: str | None = None, device: str | None = None, **data: object) -> None:
        self.told.append((kind, str(data["error"])))

    def set_status(self, status: ImageStatus, error: int = 0) -> None:
        """As the io process does."""
        head = IMAGE_STATE.pack(MAGIC, state_files._VERSION, IMAGE.size, UNIT, 1, status, error, 5, 4, 0)
        (self.context.state.directory / naming.image_state_name(IMAGE)).write_bytes(head)

    def tell(self) -> SnapshotEntry:
        entry = self.context.catalogue.snapshot(SNAPSHOT.id)
        assert entry is not None
        return broken.tell(self.context, entry)

    def form(self) -> forms.Snapshot:
        return report.snapshot_form(self.context, self.tell())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.context.catalogue.put_storage(STORAGE)
    made.context.catalogue.put_snapshot(SNAPSHOT)
    made.set_status(ImageStatus.ACTIVE)
    return made


def test_a_snapshot_that_is_whole(machine: Machine) -> None:
    assert machine.tell() == SNAPSHOT
    assert machine.told == []
    form = machine.form()
    assert (form.state, form.error, form.lost_at) == (forms.SnapshotState.ACTIVE, None, None)


def test_it_is_told_once_and_kept(machine: Machine, tmp_path: Path) -> None:
    machine.set_status(ImageStatus.OVERFLOWN, errno.ENOSPC)
    first = machine.form()
    assert first.state is forms.SnapshotState.OVERFLOWN
    assert first.error is not None
    assert "full: 1 MiB, limit 1 MiB (break)" in first.error
    assert first.lost_at is not None
    assert machine.told == [("overflow", first.error)]
    # What is said is what was so when it broke.
    larger = msgspec.structs.replace(STORAGE, areas=[*STORAGE.areas, area("/more", 0, MIB)], limit=None)
    machine.context.catalogue.put_storage(larger)
    assert machine.form().error == first.error
    again = Machine(tmp_path)
    assert again.form() == machine.form()
    assert (len(machine.told), again.told) == (1, [])


def test_what_broke_while_nobody_looked_is_told(machine: Machine, tmp_path: Path) -> None:
    machine.set_status(ImageStatus.CORRUPTED, errno.EIO)
    again = Machine(tmp_path)
    assert again.form().lost_at is not None
    assert [kind for kind, _ in again.told] == ["corrupted"]


def test_an_entry_that_was_read_before_does_not_undo_it(machine: Machine) -> None:
    machine.set_status(ImageStatus.OVERFLOWN, errno.ENOSPC)
    told = machine.tell()
    machine.context.catalogue.put_snapshot(msgspec.structs.replace(SNAPSHOT, ttl=5.0))
    kept = machine.context.catalogue.snapshot(SNAPSHOT.id)
    assert kept == msgspec.structs.replace(told, ttl=5.0)


def test_of_a_snapshot_that_is_destroyed_nothing_is_told(machine: Machine) -> None:
    machine.context.catalogue.put_snapshot(msgspec.structs.replace(SNAPSHOT, phase=Phase.DESTROYING))
    machine.set_status(ImageStatus.CORRUPTED, errno.EIO)
    machine.tell()
    broken.tell(machine.context, SNAPSHOT)  # found before the destroy began
    machine.context.catalogue.remove_snapshot(SNAPSHOT.id)
    assert broken.tell(machine.context, SNAPSHOT).broken_at is None
    assert machine.told == []


def test_many_that_look_tell_once(machine: Machine) -> None:
    machine.set_status(ImageStatus.OVERFLOWN, errno.ENOSPC)
    found: list[SnapshotEntry] = []
    threads = [threading.Thread(target=lambda: found.append(machine.tell())) for _ in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(machine.told) == 1
    assert len({each.broken_at for each in found}) == 1


def test_a_catalogue_that_cannot_be_written_does_not_tell_again_and_again(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "no")

    machine.set_status(ImageStatus.OVERFLOWN, errno.ENOSPC)
    monkeypatch.setattr(Catalogue, "_write", refuse)
    assert machine.tell() == machine.tell()
    assert len(machine.told) == 1
    monkeypatch.undo()
    again = Machine(tmp_path)
    assert again.tell().broken_at is not None
    assert len(again.told) == 1, "rather twice than never"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errno.EBADMSG, "other data than was written"),
        (errno.ESTALE, "truncated, punched or moved"),
        (errno.ENODEV, "is gone"),
        (errno.ENOMEM, "map memory is used up"),
        (errno.ETIMEDOUT, "took too long"),
        (errno.EIO, "preserving old data of /dev/sdb failed: Input/output error"),
    ],
)
def test_why_it_is_corrupted(machine: Machine, error: int, says: str) -> None:
    machine.set_status(ImageStatus.CORRUPTED, error)
    form = machine.form()
    assert form.state is forms.SnapshotState.CORRUPTED
    assert form.error is not None
    assert says in form.error
    assert f"({errno.errorcode[error]})" in form.error
    assert machine.told == [("corrupted", form.error)]


def test_portions_of_a_file_are_one_area(machine: Machine) -> None:
    areas = [
        area("/diff", 0, 8 * UNIT),
        area("/other", 4 * UNIT, UNIT, inode=8),
        area("/diff", 8 * UNIT, 2 * UNIT),
        area("/diff", 20 * UNIT, UNIT),
        area("/diff", 21 * UNIT, UNIT),
        area("/diff", 0, 0),
        area("/diff", 22 * UNIT, UNIT, inode=9),
    ]
    form = report.storage_form(machine.context, msgspec.structs.replace(STORAGE, areas=areas))
    assert [(shown.path, shown.start // 8, shown.count // 8) for shown in form.areas] == [
        ("/diff", 0, 10),
        ("/other", 4, 1),
        ("/diff", 20, 2),
        ("/diff", 22, 1),
    ]
    assert form.capacity == 14 * UNIT
    assert form.snapshots == [SNAPSHOT.id]
