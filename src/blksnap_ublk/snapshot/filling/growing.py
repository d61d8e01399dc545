# SPDX-License-Identifier: MIT
"""A difference storage grows: one of its files is made longer, and what it gained becomes an area."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from blksnap_ublk.errors import BlksnapError, from_os_error
from blksnap_ublk.host import filesystem
from blksnap_ublk.snapshot import adopting, cutting_back, enlarging, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.storage import Identity, extending

_PAGE = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """Bytes. `allowed`: what growth may still add, as far as the limit goes, or else the reserve of the file systems.
    `there`: how much of it there is room for at present, as far as it is not the share of other storages that grow on
    the same file systems.
    """

    allowed: int
    there: int


def room(context: Context, storage: StorageEntry) -> Room:
    """What growth may still add to a storage."""
    files = {area.filesystem: area for area in storage.areas if area.grows}
    free = there = 0
    for area in files.values():
        with suppress(OSError):
            descriptor = context.registry.acquire(storages.identity(area), _gone)
            try:
                found = _room_for(storage, descriptor)
            finally:
                context.registry.release(storages.identity(area))
            free += found
            there += found // max(_growing_on(context, area.filesystem), 1)
    if storage.limit is None:
        return Room(free, there)
    allowed = max(storage.limit - storage.capacity, 0) if files else 0
    return Room(allowed, min(allowed, there))


def _growing_on(context: Context, filesystem: tuple[int, int]) -> int:
    """How many storages grow on that file system."""
    return sum(
        storages.grows(storage) and any(area.grows and area.filesystem == filesystem for area in storage.areas)
        for storage in context.catalogue.storages()
    )


def grow(context: Context, key: str, wanted: int) -> int:
    """Adds `wanted` bytes to the storage of that key, or as much of it as can be had; returns how much.

    0 where it has gone meanwhile, or its limit is reached. It may wait for file systems. Raises BlksnapError, OSError.
    """
    storage = context.catalogue.storage(key)
    if storage is None or key not in context.open_storages:
        return 0
    if storage.limit is not None:
        wanted = min(wanted, storage.limit - storage.capacity)
    if wanted < storage.unit:
        return 0
    problem: BlksnapError | None = None
    for area in _last_of_each_file(storage):
        try:
            return _grow_file(context, storage, area, wanted)
        except OSError as error:
            problem = problem or from_os_error(error, subject=area.path)
    if problem is not None:
        raise problem
    return 0


def _grow_file(context: Context, storage: StorageEntry, last: AreaEntry, wanted: int) -> int:
    identity = storages.identity(last)
    end = last.offset + last.length
    descriptor = context.registry.acquire(identity, _gone)
    try:
        available = _room_for(storage, descriptor)
        if available < min(wanted, extending.SMALLEST):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        multiple = max(storage.unit, _PAGE)
        wanted = min(wanted, available)
        former = os.fstat(descriptor).st_size
        if not _announce(context, storage.key, identity, max(end + wanted, former)):
            return 0
        try:
            size = extending.extend(descriptor, end, wanted, multiple, context.growing.extending)
        except OSError:
            _announce(context, storage.key, identity, last.longest)
            raise
        with context.storage_locks.holding([storage.key]):
            current = context.catalogue.storage(storage.key)
            if current is None or current.released or storage.key not in context.open_storages:
                _take_back(context, storage.key, last, end + size, descriptor)
                return 0
            current = adopting.settle(context, current)
            _refuse_taken(context, identity, end, size)
            if current.limit is not None:  # which may have been changed meanwhile, or others have added areas
                size = min(size, max(current.limit - current.capacity, 0)) // multiple * multiple
                _cut(descriptor, end + size, former)
            if not size:
                context.catalogue.put_storage(_with_longest(current, identity, last.longest))
                return 0
            longest = max(end + size, former)
            current = _with_longest(current, identity, longest)
            # A descriptor that the keeper has serves all areas of a file.
            area = AreaEntry(
                path=last.path,
                descriptor=last.descriptor,
                filesystem=last.filesystem,
                inode=last.inode,
                offset=end,
                length=size,
                former_size=last.former_size,
                grows=True,
                longest=longest,
            )
            enlarging.append(context, current, area, descriptor)
        return size
    finally:
        context.registry.release(identity)


def _last_of_each_file(storage: StorageEntry) -> list[AreaEntry]:
    """The last area of each file that grows, in the order of the files."""
    last: dict[tuple[tuple[int, int], int], AreaEntry] = {}
    for area in storage.areas:
        if area.grows:
            last[area.filesystem, area.inode] = area
    return list(last.values())


def _room_for(storage: StorageEntry, descriptor: int) -> int:
    return filesystem.room_with_reserve(descriptor) if storage.limit is None else filesystem.room(descriptor)


def _refuse_taken(context: Context, identity: Identity, start: int, length: int) -> None:
    """What is beyond the end of a file may have been named by somebody as soon as it was there."""
    for used in storages.used_ranges(context):
        if used.identity == identity and used.start < start + length and start < used.start + used.length:
            raise OSError(errno.EBUSY, "a part of the file is used by another storage")


def _announce(context: Context, key: str, identity: Identity, longest: int) -> bool:
    """Says in the catalogue how long a file may be made; whether the storage is still there."""
    with context.storage_locks.holding([key]):
        current = context.catalogue.storage(key)
        if current is None or current.released or key not in context.open_storages:
            return False
        context.catalogue.put_storage(_with_longest(current, identity, longest))
    return True


def _with_longest(storage: StorageEntry, identity: Identity, longest: int) -> StorageEntry:
    areas = [
        msgspec.structs.replace(area, longest=longest) if storages.identity(area) == identity else area
        for area in storage.areas
    ]
    return msgspec.structs.replace(storage, areas=areas)


def _cut(descriptor: int, end: int, former: int) -> None:
    """What a file has got beyond `end`, but nothing of its former size."""
    if os.fstat(descriptor).st_size > max(end, former):
        os.ftruncate(descriptor, max(end, former))


def _take_back(context: Context, key: str, last: AreaEntry, longest: int, descriptor: int) -> None:
    """The storage was released while its file was made longer, which may have been cut back before that."""
    last = msgspec.structs.replace(last, longest=max(longest, last.longest))
    others = storages.files_of_others(context, key)
    for warning in cutting_back.restore([last], others, {storages.identity(last): descriptor}):
        _log.warning("%s", warning)


def _gone() -> NoReturn:
    raise OSError(errno.ENOENT, "the storage has been released")
