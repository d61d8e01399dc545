# SPDX-License-Identifier: MIT
"""Whether the files and block devices of a difference storage are still what they were when they were opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from blksnap_ublk.errors import NotFound
from blksnap_ublk.host import blockdev, sysfs
from blksnap_ublk.snapshot import host_view, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.storage import Identity, beneath

_SECTOR = 512
VERIFY_EVERY = 5.0
"""Seconds between two looks at where the blocks of a file beneath a filtered device lie."""


@dataclass(frozen=True)
class Damage:
    """What has happened to a file or device, in words. `errno`: old data is lost with it; None: nothing is lost."""

    path: str
    error: str
    errno: int | None = None


class DamageSearch:
    """Looks at one storage again and again; each damage is found once."""

    def __init__(self) -> None:
        self._found: set[Damage] = set()
        self._sizes: dict[Identity, int] = {}
        self._verified = 0.0

    def look(self, context: Context, storage: StorageEntry, now: float) -> list[Damage]:
        """What was not found before. `now`: seconds of any clock that only goes forward.

        For a caller that holds none of our locks: it may wait for a file system.
        """
        verify = now - self._verified >= VERIFY_EVERY
        if verify:
            self._verified = now
        with context.storage_locks.holding([storage.key]):
            if storage.key not in context.open_storages:
                return []
            found = [each for areas in _by_file(storage.areas) if (each := self._of_file(context, areas)) is not None]
        if verify:
            found += list(_moved(context, storage))
        fresh = [each for each in found if each not in self._found]
        self._found.update(fresh)
        return fresh

    def _of_file(self, context: Context, areas: Sequence[AreaEntry]) -> Damage | None:
        identity = storages.identity(areas[0])
        if identity.inode == 0:
            return self._of_device(identity, areas)
        descriptor = context.registry.acquire(identity, lambda: -1)
        try:
            return _of_regular_file(os.fstat(descriptor), areas)
        finally:
            context.registry.release(identity)

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


def _of_regular_file(status: os.stat_result, areas: Sequence[AreaEntry]) -> Damage | None:
    path = areas[0].path
    if status.st_size < max(area.offset + area.length for area in areas):
        return Damage(path, f"the file was truncated to {status.st_size} bytes", errno.ESTALE)
    if status.st_blocks * _SECTOR < sum(area.length for area in areas):
        return Damage(path, "holes were punched into the file", errno.ESTALE)
    try:
        named = os.stat(host_view.find(path))
    except FileNotFoundError:
        return Damage(path, "the file was deleted or renamed; it is held open, and nothing is lost")
    except OSError:
        return None
    if stat.S_ISDIR(named.st_mode) or os.path.samestat(named, status):
        return None
    return Damage(path, "another file has this name now; the former is held open, and nothing is lost")


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
