# SPDX-License-Identifier: MIT
"""What is done for one storage: who is evicted, and who hears of damage."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from blksnap_ublk.errors import BlksnapError, Failed
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import destroy, naming
from blksnap_ublk.snapshot.catalogue import AreaEntry, Catalogue, ImageEntry, Phase, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context, DeviceLocks
from blksnap_ublk.snapshot.filling import damage, growing
from blksnap_ublk.snapshot.filling.one_storage import OneStorage
from blksnap_ublk.snapshot.keyed_locks import KeyedLocks
from blksnap_ublk.snapshot.overflow import parse
from blksnap_ublk.snapshot.state_files import ImageStatus
from blksnap_ublk.snapshot.storage import DescriptorRegistry, Identity
from blksnap_ublk.snapshot.storage.behaviour import Facts

MIB = 1 << 20
FULL = Facts(unit=4096, capacity=MIB, used=MIB, room=0, on_overflow=parse("evict-oldest"))


class Io:
    """Breaks storages, unless it has died."""

    def __init__(self) -> None:
        self.pid = 1
        self.dead = False
        self.told: list[messages.Message] = []

    def call(self, message: messages.Message) -> None:
        if self.dead:
            raise Failed("the io process does not answer")
        self.told.append(message)


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def context(tmp_path: Path, events: list[str]) -> Iterator[Context]:
    """A catalogue, locks and open files; every image in it is active."""
    image = SimpleNamespace(status=ImageStatus.ACTIVE)
    made = SimpleNamespace(
        catalogue=Catalogue(tmp_path / "catalogue"),
        locks=DeviceLocks(),
        storage_locks=KeyedLocks(),
        open_storages={"key"},
        registry=DescriptorRegistry(),
        conditions={},
        state=SimpleNamespace(image_state=lambda name: image),
        io=Io(),
        emit=lambda kind, **data: events.append(kind),
    )
    yield cast("Context", made)
    for identity in made.registry.held():
        made.registry.release(identity)


def _add(context: Context, name: str, number: int, created: str = "") -> SnapshotEntry:
    image = ImageEntry(f"{name}.0", "d", "/dev/ublkb0", "/dev/sdb", MIB, 4096, number, "g", number, None)
    entry = SnapshotEntry(name, created or name, Phase.ACTIVE, False, 0, [image], "key", members=["d"])
    context.catalogue.put_snapshot(entry)
    return entry


def _file(context: Context, path: Path, *, grows: bool = False) -> StorageEntry:
    path.write_bytes(b"s" * MIB)
    status = os.stat(path)
    number = DeviceNumber.of(status.st_dev)
    area = AreaEntry(str(path), "storage:key:0", (number.major, number.minor), status.st_ino, 0, MIB, grows=grows)
    context.registry.acquire(Identity(number, status.st_ino), lambda: os.open(path, os.O_RDWR | os.O_CLOEXEC))
    storage = StorageEntry("key", 4096, None, "break", [area])
    context.catalogue.put_storage(storage)
    return storage


def _one(context: Context) -> OneStorage:
    return OneStorage(context, "key", None)  # type: ignore[arg-type]


def test_the_oldest_is_found_by_number_not_by_the_clock(context: Context) -> None:
    _add(context, "first", 1, "2026-01-01T12:00:00")
    _add(context, "second", 2, "2026-01-01T11:00:00")
    _add(context, "later", (1 << 24) - 1, "2026-01-01T10:00:00")
    assert [entry.id for entry in naming.snapshots_in(context.catalogue, "key")] == ["later", "first", "second"]
    context.catalogue.remove_snapshot("later")
    assert [entry.id for entry in naming.snapshots_in(context.catalogue, "key")] == ["first", "second"]


def test_who_ends_first_decides_who_is_evicted(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last snapshot stays, although there were two when it was found that one has to go."""
    _add(context, "a", 1)
    _add(context, "b", 2)
    gone: list[str] = []

    def destroy_locked(context: Context, entry: SnapshotEntry, **options: object) -> list[str]:
        gone.append(entry.id)
        context.catalogue.remove_snapshot(entry.id)
        return []

    monkeypatch.setattr(destroy, "destroy_locked", destroy_locked)
    evicting = threading.Thread(target=_one(context)._evict, args=(FULL,))
    with context.locks.holding(["d"]):
        evicting.start()
        context.catalogue.remove_snapshot("b")
    evicting.join()
    assert gone == []
    _add(context, "b", 2)
    _one(context)._evict(FULL)
    assert gone == ["a"]


def test_an_eviction_that_fails_is_told_once(
    context: Context, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(context, "a", 1)
    _add(context, "b", 2)

    def fails(*arguments: object, **options: object) -> list[str]:
        raise Failed("busy")

    monkeypatch.setattr(destroy, "destroy_locked", fails)
    one = _one(context)
    for _ in range(3):
        with pytest.raises(Failed):
            one._evict(FULL)
    assert events == ["evicted"]


def test_every_io_process_hears_of_damage_and_users_once(context: Context, events: list[str], tmp_path: Path) -> None:
    _add(context, "a", 1)
    storage = _file(context, tmp_path / "file")
    io = cast("Io", context.io)
    one = _one(context)
    one._look_for_damage(storage)
    os.truncate(tmp_path / "file", 4096)
    io.dead = True
    with pytest.raises(BlksnapError):
        one._look_for_damage(storage)
    io.dead, io.pid = False, 2
    for _ in range(2):
        one._look_for_damage(storage)
    io.pid = 3
    one._look_for_damage(storage)
    assert [message.storage for message in io.told if isinstance(message, messages.BreakStorage)] == ["key"] * 2
    assert events == ["storage-damaged"]


def test_a_name_that_is_lost_is_noticed_without_looking_it_up(context: Context, tmp_path: Path) -> None:
    """A look-up may wait for a device that only this process can serve again."""
    storage = _file(context, tmp_path / "file")
    search = damage.DamageSearch()
    assert search.look(context, storage, 1.0) == []
    (tmp_path / "file").rename(tmp_path / "other")
    (found,) = search.look(context, storage, 2.0)
    assert (found.path, found.errno) == (str(tmp_path / "file"), None)
    (tmp_path / "other").rename(tmp_path / "file")
    assert search.look(context, storage, 3.0) == []
    (tmp_path / "file").unlink()
    assert len(search.look(context, storage, 4.0)) == 1
    assert len(damage.DamageSearch().look(context, storage, 5.0)) == 1


def test_a_file_without_a_name_lacks_none(context: Context, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    os.write(descriptor, bytes(MIB))
    status = os.fstat(descriptor)
    number = DeviceNumber.of(status.st_dev)
    context.registry.acquire(Identity(number, status.st_ino), lambda: descriptor)
    area = AreaEntry(str(tmp_path), "storage:key:0", (number.major, number.minor), status.st_ino, 0, MIB)
    storage = StorageEntry("key", 4096, None, "break", [area])
    search = damage.DamageSearch()
    assert search.look(context, storage, 1.0) == []
    handle = os.open(tmp_path, os.O_PATH)
    os.link(f"/proc/self/fd/{descriptor}", "named", dst_dir_fd=handle, follow_symlinks=True)
    os.close(handle)
    area = msgspec.structs.replace(area, path=str(tmp_path / "named"), former_size=-1)
    storage = StorageEntry("key", 4096, None, "break", [area])
    assert search.look(context, storage, 2.0) == []
    (tmp_path / "named").unlink()
    assert len(search.look(context, storage, 3.0)) == 1


def test_storages_that_grow_on_one_file_system_share_it(context: Context, tmp_path: Path) -> None:
    storage = _file(context, tmp_path / "file", grows=True)
    alone = growing.room(context, storage)
    assert 0 < alone.there <= alone.allowed
    context.catalogue.put_storage(StorageEntry("other", 4096, None, "break", storage.areas))
    shared = growing.room(context, storage)
    assert shared.there <= shared.allowed // 2
