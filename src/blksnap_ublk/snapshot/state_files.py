# SPDX-License-Identifier: MIT
"""Files of the state directory that the io process maps and this process reads.

They lie on a tmpfs of our own and outlive any process. Every byte is allocated and written before a file is handed
out: touching a hole of a full tmpfs would kill the process that maps it. The layouts are those of `csrc/core/state.h`.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from blksnap_ublk.errors import Failed

PAGE = 4096
PORTION_BYTES = 16 << 20
"""Bytes of one portion of map memory."""
RECORD_BYTES = 16

_ZEROES = bytes(1 << 20)
_STORAGE_MAGIC = 0x53555342
_IMAGE_MAGIC = 0x49555342
_VERSION = 4
# magic, version, unit, areas, high_water, capacity, used, full, waiting, pad; then what is used of each area
_STORAGE = struct.Struct("<IIIIQQQII16x")
_AREAS_MAX = 4096
# magic, version, size, unit, serial, status, error, preserved, directory_entries, written, releasing, exempt
_IMAGE = struct.Struct("<IIQIIIiQQQII")
IMAGE_HEADER = 4096
"""Bytes before the maps in an image state file."""
_TABLE_UNITS = 64 * 1024


class ImageStatus(IntEnum):
    """What the io process says of an image; `NEW` before it was taken."""

    NEW = 0
    ACTIVE = 1
    OVERFLOWN = 2
    CORRUPTED = 3
    GONE = 4


@dataclass(frozen=True)
class ImageState:
    """The head of an image state file. `error` is a positive errno, 0 while active.

    `preserved`, and `written`, to the image itself, are in bytes.
    """

    status: ImageStatus
    error: int
    preserved: int
    written: int = 0


@dataclass(frozen=True)
class StorageState:
    """A storage state file. `used`, `capacity`, and `areas`, what is used of each area, are in places of one unit.

    `high_water`: no place from there on was ever given out. `waiting`: requests that wait for room now.
    """

    used: int
    capacity: int
    areas: tuple[int, ...]
    high_water: int = 0
    waiting: int = 0


def image_state_bytes(size: int, unit: int) -> int:
    """Length of the image state file of a device of `size` bytes."""
    units = -(-size // unit)
    directory = -(-units // _TABLE_UNITS)
    return _pages(IMAGE_HEADER + 2 * 4 * directory)


def records_bytes(length: int, unit: int) -> int:
    """Length of the records file of an area of `length` bytes."""
    return _pages(length // unit * RECORD_BYTES)


def storage_state_bytes() -> int:
    """Length of a storage state file."""
    return _pages(_STORAGE.size + 4 * _AREAS_MAX)


def swallowed_bytes(size: int, tracking_block: int) -> int:
    """Length of the file that remembers swallowed trims: one bit for each tracking block."""
    blocks = -(-size // tracking_block)
    return _pages(-(-blocks // 64) * 8)


class StateFiles:
    """The state directory: creates, opens and removes files in it by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Where a file of that name is or would be."""
        return self.directory / name

    def create(self, name: str, length: int) -> int:
        """A descriptor of a zeroed file of `length` bytes, all allocated. Raises Failed, and leaves nothing then.

        A file of that name that is left over from an interrupted attempt is replaced.
        """
        path = self.path(name)
        self.remove(name)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _allocate(descriptor, length)
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise Failed(
                    f"no room for {length} bytes of state in {self.directory}",
                    errno=errno.errorcode[error.errno],
                    advice="destroy snapshots, or restart the daemon with a larger --state-size",
                ) from None
            raise
        return descriptor

    def open(self, name: str) -> int:
        """A descriptor of an existing file. Raises FileNotFoundError."""
        return os.open(self.path(name), os.O_RDWR | os.O_CLOEXEC)

    def remove(self, name: str) -> None:
        """Removes a file, or a directory with all in it; nothing happens where there is none."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """What is in the directory."""
        return sorted(os.listdir(self.directory))

    def image_state(self, name: str) -> ImageState | None:
        """What an image state file says; None where there is none or the io process has not written it yet."""
        head = self._head(name, _IMAGE.size)
        if head is None:
            return None
        magic, version, _, unit, _, status, error, preserved, _, written, _, _ = _IMAGE.unpack(head)
        if magic != _IMAGE_MAGIC or version != _VERSION:
            return None
        known = ImageStatus(status) if status <= max(ImageStatus) else ImageStatus.CORRUPTED
        return ImageState(known, error, preserved * unit, written * unit)

    def storage_state(self, name: str) -> StorageState | None:
        """What a storage state file says; None where there is none or the io process has not written it yet."""
        head = self._head(name, _STORAGE.size + 4 * _AREAS_MAX)
        if head is None:
            return None
        magic, version, _, areas, high_water, capacity, used, _, waiting = _STORAGE.unpack_from(head)
        if magic != _STORAGE_MAGIC or version != _VERSION or areas > _AREAS_MAX:
            return None
        used_of_areas = struct.unpack_from(f"<{areas}I", head, _STORAGE.size)
        return StorageState(min(used, capacity), capacity, used_of_areas, high_water, waiting)

    def _head(self, name: str, length: int) -> bytes | None:
        try:
            with self.path(name).open("rb", buffering=0) as file:
                head = file.read(length)
        except FileNotFoundError:
            return None
        return head if len(head) == length else None


def _allocate(descriptor: int, length: int) -> None:
    os.posix_fallocate(descriptor, 0, length)
    done = 0
    while done < length:
        done += os.pwrite(descriptor, _ZEROES[: length - done], done)


def _pages(length: int) -> int:
    return max(-(-length // PAGE), 1) * PAGE
