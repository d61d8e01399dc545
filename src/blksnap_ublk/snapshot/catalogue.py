# SPDX-License-Identifier: MIT
"""What the control process must know again after a kill -9: the devices and snapshots, one small file for each.

Each file is JSON with a version and a checksum, replaced by an atomic rename, so that a change of one object is either
there or not, and damage costs one object only. Entries are immutable; to change one, `put` another with the same key.
"""

from __future__ import annotations

import logging
import os
import threading
import zlib
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec

_VERSION = 1
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
    made for it and is removed; None for one that stays as it is.
    """

    path: str
    descriptor: str
    filesystem: tuple[int, int]
    inode: int
    offset: int
    length: int
    former_size: int | None = None


class StorageEntry(msgspec.Struct, frozen=True):
    """A difference storage."""

    key: str
    unit: int
    limit: int | None
    on_overflow: str
    areas: list[AreaEntry]


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

    `members`: the keys of its devices, also before it has images.
    """

    id: str
    created: str
    phase: Phase
    frozen: bool
    gate_us: int
    images: list[ImageEntry]
    storage: StorageEntry
    lost: str | None = None
    members: list[str] = []


Entry = TypeVar("Entry", DeviceEntry, SnapshotEntry)


class _File(msgspec.Struct, frozen=True):
    version: int
    checksum: int
    entry: msgspec.Raw


class Catalogue:
    """The devices and snapshots, in memory and in `directory`. All methods may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        """Reads what is there. `damaged` lists the keys of files that could not be read; they are set aside."""
        self._directory = directory
        self._lock = threading.Lock()
        directory.mkdir(mode=0o700, exist_ok=True)
        self.damaged: list[str] = []
        for leftover in directory.glob("*.writing"):
            leftover.unlink()
        self._devices = self._load("device", DeviceEntry)
        self._snapshots = self._load("snapshot", SnapshotEntry)

    def devices(self) -> list[DeviceEntry]:
        """All devices in the order in which they were attached."""
        with self._lock:
            return list(self._devices.values())

    def snapshots(self) -> list[SnapshotEntry]:
        """All snapshots, oldest first."""
        with self._lock:
            return sorted(self._snapshots.values(), key=lambda entry: entry.created)

    def device(self, key: str) -> DeviceEntry | None:
        """The device of a key."""
        with self._lock:
            return self._devices.get(key)

    def snapshot(self, key: str) -> SnapshotEntry | None:
        """The snapshot of a full id."""
        with self._lock:
            return self._snapshots.get(key)

    def put_device(self, entry: DeviceEntry) -> None:
        """Adds or replaces a device. Raises OSError; nothing has changed then."""
        with self._lock:
            self._write("device", entry.key, entry)
            self._devices[entry.key] = entry

    def put_snapshot(self, entry: SnapshotEntry) -> None:
        """Adds or replaces a snapshot. Raises OSError; nothing has changed then."""
        with self._lock:
            self._write("snapshot", entry.id, entry)
            self._snapshots[entry.id] = entry

    def remove_device(self, key: str) -> None:
        """Forgets a device."""
        with self._lock:
            self._devices.pop(key, None)
            self._path("device", key).unlink(missing_ok=True)

    def remove_snapshot(self, key: str) -> None:
        """Forgets a snapshot."""
        with self._lock:
            self._snapshots.pop(key, None)
            self._path("snapshot", key).unlink(missing_ok=True)

    def next_serial(self) -> int:
        """A serial that no image has."""
        used = {image.serial for entry in self.snapshots() for image in entry.images}
        return next(serial for serial in range(1, len(used) + 2) if serial not in used)

    def _path(self, kind: str, key: str) -> Path:
        return self._directory / f"{kind}-{key}.json"

    def _write(self, kind: str, key: str, entry: DeviceEntry | SnapshotEntry) -> None:
        path = self._path(kind, key)
        body = msgspec.json.encode(entry)
        writing = path.with_suffix(".writing")
        descriptor = os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(_File(_VERSION, zlib.crc32(body), msgspec.Raw(body))))
        os.rename(writing, path)

    def _load(self, kind: str, form: type[Entry]) -> dict[str, Entry]:
        found: list[tuple[int, str, Entry]] = []
        for path in self._directory.glob(f"{kind}-*.json"):
            key = path.stem.removeprefix(f"{kind}-")
            try:
                file = msgspec.json.decode(path.read_bytes(), type=_File)
                if file.version != _VERSION or zlib.crc32(bytes(file.entry)) != file.checksum:
                    raise ValueError("wrong version or checksum")
                entry = msgspec.json.decode(file.entry, type=form)
            except (ValueError, RecursionError) as error:
                _log.error("%s: damaged (%s)", path, error)
                self.damaged.append(key)
                path.rename(path.with_suffix(".damaged"))
                continue
            found.append((path.stat().st_mtime_ns, key, entry))
        return {key: entry for _, key, entry in sorted(found, key=lambda item: item[:2])}
