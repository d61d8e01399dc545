# SPDX-License-Identifier: MIT
"""Whether the files and block devices of a difference storage are still what they were when they were opened."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import NoReturn

from blksnap_ublk.errors import NotFound
from blksnap_ublk.host import blockdev, sysfs
from blksnap_ublk.snapshot import storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.storage import Identity, beneath

_SECTOR = 512
_DELETED = " (deleted)"
VERIFY_EVERY = 5.0
"""Seconds between two looks at where the blocks of a file beneath a filtered device lie."""


@dataclass(frozen=True)
class Damage:
    """What has happened to a file or device, in words. `errno`: old data is lost with it; None: nothing is lost."""

    path: str
    error: str
    errno: int | None = None


class DamageSearch:
    """Looks at one storage again and again."""

    def __init__(self) -> None:
        self._sizes: dict[Identity, int] = {}
        self._names: dict[Identity, str] = {}
        self._verified = 0.0

    def look(self, context: Context, storage: StorageEntry, now: float) -> list[Damage]:
        """What there is. `now`: seconds of any clock that only goes forward.

        For a caller that holds none of our locks, and none is held here while a file system is waited for.
        """
        verify = now - self._verified >= VERIFY_EVERY
        if verify:
            self._verified = now
        found = []
        with ExitStack() as closing:
            files = []
            with context.storage_locks.holding([storage.key]):
                if storage.key not in context.open_storages:
                    return []
                for areas in _by_file(storage.areas):
                    if areas[0].beneath in context.conditions:
                        continue  # its file system waits for a device that is not served
                    with suppress(OSError):
                        files.append((areas, _duplicate(context, areas[0], closing)))
            found = [each for areas, descriptor in files if (each := self._of_file(areas, descriptor)) is not None]
        if verify:
            found += list(_moved(context, storage))
        return found

    def _of_file(self, areas: Sequence[AreaEntry], descriptor: int | None) -> Damage | None:
        if descriptor is None:
            return self._of_device(storages.identity(areas[0]), areas)
        status = os.fstat(descriptor)
        return _of_data(status, areas) or self._of_name(descriptor, status, areas[0])

    def _of_name(self, descriptor: int, status: os.stat_result, area: AreaEntry) -> Damage | None:
        """The kernel says what a file is called that is open; a path would have to be looked up, on devices of ours."""
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        former = self._names.setdefault(storages.identity(area), name)
        if name.endswith(f"/#{area.inode}{_DELETED}"):  # made without a name; it may have got one later
            gone = area.former_size == -1 and status.st_nlink == 0
        else:
            gone = name.endswith(_DELETED)
        if name == former and not gone:
            return None
        return Damage(area.path, "the file was deleted or renamed; it is held open, and nothing is lost")

    def _of_device(self, identity: Identity, areas: Sequence[AreaEntry]) -> Damage | None:
        path = areas[0].path
        try:
            size = sysfs.integer(sysfs.directory(identity.device), "size") * blockdev.SECTOR
        except NotFound:
            return Damage(path, "the device is gone", errno.ENODEV)
        former = self._sizes.setdefault(identity, size)
        if size < max(area.offset + area.length for area in areas):
            return Damage(path, f"the device has {size} bytes now, fewer than are used of it", errno.ESTALE)
        return Damage(path, f"the device has {size} bytes now, {former} before") if size != former else None


def _duplicate(context: Context, area: AreaEntry, closing: ExitStack) -> int | None:
    """Of the file of an area, until `closing`; None for a block device."""
    identity = storages.identity(area)
    if identity.inode == 0:
        return None
    descriptor = os.dup(context.registry.acquire(identity, _gone))
    context.registry.release(identity)
    closing.callback(os.close, descriptor)
    return descriptor


def _gone() -> NoReturn:
    raise OSError(errno.ENOENT, "the storage has been released")


def _of_data(status: os.stat_result, areas: Sequence[AreaEntry]) -> Damage | None:
    path = areas[0].path
    if status.st_size < max(area.offset + area.length for area in areas):
        return Damage(path, f"the file was truncated to {status.st_size} bytes", errno.ESTALE)
    if status.st_blocks * _SECTOR < sum(area.length for area in areas):
        return Damage(path, "holes were punched into the file", errno.ESTALE)
    return None


def _moved(context: Context, storage: StorageEntry) -> Iterator[Damage]:
    """Of files beneath a filtered device, which is asked for nothing while it is not served."""
    for areas in _by_file([area for area in storage.areas if area.beneath is not None]):
        if areas[0].beneath in context.conditions:
            continue
        try:
            descriptor = context.keeper.get(areas[0].descriptor)
        except OSError:
            continue
        try:
            error = beneath.verify(areas, descriptor)
        finally:
            os.close(descriptor)
        if error is not None:
            yield Damage(areas[0].path, error, errno.ESTALE)


def _by_file(areas: Sequence[AreaEntry]) -> list[list[AreaEntry]]:
    def key(area: AreaEntry) -> tuple[tuple[int, int], int]:
        return area.filesystem, area.inode

    return [list(same) for _, same in groupby(sorted(areas, key=key), key)]
