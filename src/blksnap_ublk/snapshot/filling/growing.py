# SPDX-License-Identifier: MIT
"""A difference storage grows: one of its files is made longer, and what it gained becomes an area."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from blksnap_ublk.errors import BlksnapError, from_os_error
from blksnap_ublk.host import filesystem
from blksnap_ublk.snapshot import adopting, enlarging, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.storage import Identity, extending

_PAGE = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """Bytes. `allowed`: what growth may still add, as far as the limit goes, or else the reserve of the file systems.
    `there`: how much of it there is room for at present.
    """

    allowed: int
    there: int


def room(context: Context, storage: StorageEntry) -> Room:
    """What growth may still add to a storage."""
    files = {area.filesystem: area for area in storage.areas if area.grows}
    there = 0
    for area in files.values():
        with suppress(OSError):
            descriptor = context.registry.acquire(storages.identity(area), _gone)
            try:
                there += _room_for(storage, descriptor)
            finally:
                context.registry.release(storages.identity(area))
    if storage.limit is None:
        return Room(there, there)
    allowed = max(storage.limit - storage.capacity, 0) if files else 0
    return Room(allowed, min(allowed, there))


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
        size = extending.extend(descriptor, end, min(wanted, available), multiple, context.growing.extending)
        with context.storage_locks.holding([storage.key]):
            current = context.catalogue.storage(storage.key)
            if current is None or storage.key not in context.open_storages:
                _take_back(context, last, descriptor)
                return 0
            current = adopting.settle(context, current)
            _refuse_taken(context, identity, end, size)
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


def _take_back(context: Context, last: AreaEntry, descriptor: int) -> None:
    """The storage was released while its file was made longer: it was cut back before that."""
    others = {used.identity for used in storages.used_ranges(context)}
    if last.former_size is None or last.former_size < 0 or storages.identity(last) in others:
        return
    if os.fstat(descriptor).st_size > last.former_size:
        os.ftruncate(descriptor, last.former_size)
        _log.info("%s: cut back again", last.path)


def _gone() -> NoReturn:
    raise OSError(errno.ENOENT, "the storage has been released")
