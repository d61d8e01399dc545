# SPDX-License-Identifier: MIT
"""What the control process must know again after a kill -9: devices, snapshots, storages, one small file for each.

Each file is JSON with a version and a checksum, replaced by an atomic rename, so that a change of one object is either
there or not, and damage costs one object only. Each is there twice, and either is enough. Entries are immutable; to
change one, `put` another with the same key.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import zlib
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec

from blksnap_ublk.snapshot.spare_file import SpareFile

_VERSION = 1
_SERIAL_MAX = (1 << 24) - 1
_FIRST, _COPY = ".json", ".copy"
_log = logging.getLogger(__name__)


class Phase(StrEnum):
    """How far an object is. What is not active when the control process starts is undone."""

    CREATING = "creating"
    ACTIVE = "active"
    DESTROYING = "destroying"


class Served(msgspec.Struct, frozen=True):
    """A ublk device as the kernel granted it; what its queues are started with.

    `mark` tells it from a later one that the kernel gave the same id to.
    """

    ublk_id: int
    queues: int
    depth: int
    desc_size: int
    flags: int
    zero_copy: bool
    mark: int = 0


class DeviceEntry(msgspec.Struct, frozen=True):
    """A filtered device. `key` names it to the io process and in the state directory; sizes in bytes.

    `served` is None before its ublk device exists.
    """

    key: str
    name: str
    origin: str
    number: tuple[int, int]
    size: int
    block: int
    unit: int
    tracking_block: int
    phase: Phase
    served: Served | None = None


class AreaEntry(msgspec.Struct, frozen=True):
    """An area of a difference storage, in bytes. `descriptor`: the name under which the keeper holds its file.

    `former_size`: what a file that was extended for the storage is cut back to when it is released; -1 for one that was
    made for it and is removed; None for one that stays as it is. `longest`: what the file may have been made; where it
    is longer than that, others have written to it. `grows`: the file may be made longer by itself.

    `offset` is the place in the file `path`. `beneath`: the key of the filtered device on whose origin the area is
    written, at `physical` there; None for one that is written through its file.
    """

    path: str
    descriptor: str
    filesystem: tuple[int, int]
    inode: int
    offset: int
    length: int
    former_size: int | None = None
    beneath: str | None = None
    physical: int | None = None
    grows: bool = False
    longest: int = 0


class StorageEntry(msgspec.Struct, frozen=True):
    """A difference storage, shared by the snapshots whose `storage_key` is its key; it ends with the last of them.

    `areas` stand in the order in which the io process has them; it may lack the last of them when an operation was
    broken off. `announced`: files, without length, that may be made longer for it before there is more to say.

    `limit` in bytes: what growth may not pass; None: no limit but the file system's. `on_overflow` is the text that
    `overflow.parse` reads. `wipe`: its areas are overwritten when they are given back. `copy_rate`: bytes per second
    that copy-on-write may write to it; None: no limit. `released`: no snapshot and no io process uses it any more, and
    its files are to be given back.
    """

    key: str
    unit: int
    limit: int | None
    on_overflow: str
    areas: list[AreaEntry]
    wipe: bool = False
    copy_rate: int | None = None
    announced: list[AreaEntry] = []
    released: bool = False

    @property
    def capacity(self) -> int:
        """Bytes in all areas, in whole units."""
        return sum(area.length // self.unit for area in self.areas) * self.unit


class ImageEntry(msgspec.Struct, frozen=True):
    """One member of a snapshot. `served`: its ublk device, once it exists. `serial` names its map in the records."""

    key: str
    device: str
    filtered: str
    origin: str
    size: int
    unit: int
    serial: int
    generation: str
    change_number: int
    served: Served | None


class SnapshotEntry(msgspec.Struct, frozen=True):
    """A snapshot. `lost` says why it is corrupted although no image says so, for instance after the io process died.

    `members`: the keys of its devices, also before it has images. `storage_key`: its difference storage. `partitions`:
    those of its images are scanned. `ttl`: seconds that it was given to live, `expires`: the unix time when they end.
    `while_pid`: it ends with that process, whose start time is `while_pid_start` (field 22 of /proc/PID/stat).
    `broken_at`, in unix time, and `broken_why` are what was told when it broke.
    """

    id: str
    created: str
    phase: Phase
    frozen: bool
    gate_us: int
    images: list[ImageEntry]
    storage_key: str
    lost: str | None = None
    members: list[str] = []
    partitions: bool = False
    ttl: float | None = None
    expires: float | None = None
    while_pid: int | None = None
    while_pid_start: int | None = None
    gate_writes_us: int = 0
    broken_at: float | None = None
    broken_why: str | None = None


Entry = TypeVar("Entry", DeviceEntry, StorageEntry, SnapshotEntry)


class _File(msgspec.Struct, frozen=True):
    version: int
    checksum: int
    entry: msgspec.Raw


class Catalogue:
    """The devices, snapshots and storages, in memory and in `directory`. All methods may be called from any thread.

    A full file system does not keep an entry from being changed: room for that is set aside.
    """

    def __init__(self, directory: Path) -> None:
        """Reads what is there. `damaged` lists the keys of entries that could not be read; they are set aside."""
        self._directory = directory
        self._lock = threading.Lock()
        directory.mkdir(mode=0o700, exist_ok=True)
        self.damaged: list[str] = []
        for leftover in directory.glob("*.writing"):
            leftover.unlink()
        self._devices = self._load("device", DeviceEntry)
        self._storages = self._load("storage", StorageEntry)
        self._snapshots = self._load("snapshot", SnapshotEntry)
        self._spare = SpareFile(directory / "spare")
        self._last_serial = max([self._read_serial(), *self._serials()])

    def devices(self) -> list[DeviceEntry]:
        """All devices in the order in which they were attached."""
        with self._lock:
            return list(self._devices.values())

    def storages(self) -> list[StorageEntry]:
        """All storages."""
        with self._lock:
            return list(self._storages.values())

    def snapshots(self) -> list[SnapshotEntry]:
        """All snapshots, oldest first, in the order of their serials: clocks are set back now and then."""
        with self._lock:
            serials = self._serials()
            wrapped = bool(serials) and max(serials) - min(serials) > _SERIAL_MAX // 2
            return sorted(self._snapshots.values(), key=lambda entry: _age(entry, wrapped=wrapped))

    def device(self, key: str) -> DeviceEntry | None:
        """The device of a key."""
        with self._lock:
            return self._devices.get(key)

    def storage(self, key: str) -> StorageEntry | None:
        """The storage of a key."""
        with self._lock:
            return self._storages.get(key)

    def snapshot(self, key: str) -> SnapshotEntry | None:
        """The snapshot of a full id."""
        with self._lock:
            return self._snapshots.get(key)

    def put_device(self, entry: DeviceEntry) -> None:
        """Adds or replaces a device. Raises OSError; nothing has changed then."""
        with self._lock:
            self._write("device", entry.key, entry, self._devices)

    def put_storage(self, entry: StorageEntry) -> None:
        """Adds or replaces a storage. Raises OSError; nothing has changed then."""
        with self._lock:
            self._write("storage", entry.key, entry, self._storages)

    def put_snapshot(self, entry: SnapshotEntry) -> None:
        """Adds or replaces a snapshot. Raises OSError; nothing has changed then.

        When and why it broke stays, also where the caller has read its entry before that.
        """
        with self._lock:
            former = self._snapshots.get(entry.id)
            if former is not None and former.broken_at is not None:
                kept = {"broken_at": former.broken_at, "broken_why": former.broken_why}
                entry = msgspec.structs.replace(entry, **kept)
            self._write("snapshot", entry.id, entry, self._snapshots)

    def note_broken(self, key: str, at: float, why: str) -> None:
        """Remembers, once, that the snapshot of a full id broke; where that cannot be written, until a restart."""
        with self._lock:
            entry = self._snapshots.get(key)
            if entry is None or entry.broken_at is not None:
                return
            entry = msgspec.structs.replace(entry, broken_at=at, broken_why=why)
            try:
                self._write("snapshot", key, entry, self._snapshots)
            except OSError as error:
                _log.error("snapshot %s: cannot be written: %s", key, error)
                self._snapshots[key] = entry

    def remove_device(self, key: str) -> None:
        """Forgets a device."""
        with self._lock:
            self._remove("device", key, self._devices)

    def remove_storage(self, key: str) -> None:
        """Forgets a storage."""
        with self._lock:
            self._remove("storage", key, self._storages)

    def remove_snapshot(self, key: str) -> None:
        """Forgets a snapshot."""
        with self._lock:
            self._remove("snapshot", key, self._snapshots)

    def take_serials(self, count: int) -> list[int]:
        """So many serials, higher than those of all images so far, of which a storage may still hold records.

        They begin again after 2^24, without those that images have. Raises OSError.
        """
        with self._lock:
            used = self._serials()
            found: list[int] = []
            last = self._last_serial
            while len(found) < count:
                last = last % _SERIAL_MAX + 1
                if last not in used:
                    found.append(last)
            self._replace(self._directory / "serial", b"%d\n" % last, spare=False)
            self._last_serial = last
            return found

    def _serials(self) -> set[int]:
        return {image.serial for entry in self._snapshots.values() for image in entry.images}

    def _read_serial(self) -> int:
        try:
            number = int((self._directory / "serial").read_bytes())
        except (OSError, ValueError):
            return 0
        return number if 0 <= number <= _SERIAL_MAX else 0

    def _path(self, kind: str, key: str) -> Path:
        return self._directory / f"{kind}-{key}{_FIRST}"

    def _write(self, kind: str, key: str, entry: Entry, among: dict[str, Entry]) -> None:
        body = msgspec.json.encode(entry)
        text = msgspec.json.encode(_File(_VERSION, zlib.crc32(body), msgspec.Raw(body)))
        # What is there already can always be changed; what is added leaves the room set aside alone.
        path = self._path(kind, key)
        self._replace(path, text, spare=key in among)
        among[key] = entry
        copy = path.with_suffix(_COPY)
        try:
            _write_whole(path.with_suffix(".writing"), text)
            os.rename(path.with_suffix(".writing"), copy)
        except OSError:
            # An older one must not be taken for this one.
            path.with_suffix(".writing").unlink(missing_ok=True)
            copy.unlink(missing_ok=True)

    def _replace(self, path: Path, text: bytes, *, spare: bool) -> None:
        writing = path.with_suffix(".writing")
        try:
            self._spare.ensure(2 * len(text))
            _write_whole(writing, text)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            writing.unlink(missing_ok=True)
            if not spare or not self._spare.become(writing, text):
                raise
        os.rename(writing, path)
        with suppress(OSError):
            self._spare.ensure(2 * len(text))

    def _remove(self, kind: str, key: str, among: dict[str, Entry]) -> None:
        among.pop(key, None)
        path = self._path(kind, key)
        path.with_suffix(_COPY).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def _load(self, kind: str, form: type[Entry]) -> dict[str, Entry]:
        found: list[tuple[int, str, Entry]] = []
        keys = {path.stem for path in self._directory.glob(f"{kind}-*") if path.suffix in (_FIRST, _COPY)}
        for stem in sorted(keys):
            paths = [self._directory / f"{stem}{suffix}" for suffix in (_FIRST, _COPY)]
            entry = next((each for path in paths if (each := _read(path, form)) is not None), None)
            key = stem.removeprefix(f"{kind}-")
            if entry is not None:
                changed = max(path.stat().st_mtime_ns for path in paths if path.exists())
                found.append((changed, key, entry))
                continue
            self.damaged.append(key)
            for path in paths:
                if path.exists():
                    path.rename(f"{path}.damaged")
        return {key: entry for _, key, entry in sorted(found, key=lambda item: item[:2])}


def _age(entry: SnapshotEntry, *, wrapped: bool) -> tuple[int, str]:
    """Rises with each snapshot; one without images is about to be taken. `wrapped`: serials have begun again."""
    if not entry.images:
        return 2 * _SERIAL_MAX + 1, entry.created
    first = min(image.serial for image in entry.images)
    return first + (_SERIAL_MAX if wrapped and first <= _SERIAL_MAX // 2 else 0), entry.created


def _read(path: Path, form: type[Entry]) -> Entry | None:
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        if file.version != _VERSION or zlib.crc32(bytes(file.entry)) != file.checksum:
            raise ValueError("wrong version or checksum")
        return msgspec.json.decode(file.entry, type=form)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        _log.error("%s: damaged (%s)", path, error)
        return None


def _write_whole(path: Path, text: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)
