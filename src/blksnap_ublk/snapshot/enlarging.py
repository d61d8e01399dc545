# SPDX-License-Identifier: MIT
"""A difference storage that is in use made larger: by what the user names, and by changing what it may grow to."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec

from blksnap_ublk.errors import BlksnapError, Busy, Failed, NotFound, Unsupported, UsageError
from blksnap_ublk.forms import SnapshotState
from blksnap_ublk.snapshot import adopting, cutting_back, naming, releasing, report, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.storage import OpenAreas, Planned
from blksnap_ublk.snapshot.undoing import quietly

_HELD_LIMIT = 5.0  # seconds
_log = logging.getLogger(__name__)


def add(context: Context, snapshot: SnapshotEntry, specs: Sequence[Spec]) -> StorageEntry:
    """Adds what the user names to the storage of a snapshot, and so to that of all that share it.

    Raises BlksnapError; nothing has changed then, but where the io process took a part only: the error says so.
    """
    if not specs:
        raise UsageError("no difference storage is named", advice="name a file, a directory or a block device")
    key = snapshot.storage_key
    _wait_until_held(context, snapshot)
    releasing.wait_for_named(context, specs)
    announced: list[AreaEntry] = []

    def announce(planned: Sequence[Planned]) -> None:
        announced.extend(storages.announced(planned))
        with in_use(context, snapshot) as storage:
            storage = msgspec.structs.replace(storage, announced=[*storage.announced, *announced])
            context.catalogue.put_storage(storage)

    with context.storage_locks.holding(storages.files_of(specs)):
        with in_use(context, snapshot) as storage:
            pass
        try:
            with ExitStack() as undo:
                limit = None if storage.limit is None else max(storage.limit - storage.capacity, 0)
                needed = sum(image.size for image in snapshot.images)
                opened = storages.open_areas(
                    context, specs, limit=limit, needed=needed, unit=storage.unit, announce=announce
                )
                undo.callback(opened.undo)
                storages.write_areas_ahead(opened)
                with in_use(context, snapshot) as storage:
                    storage = adopting.settle(context, storage)
                    areas = storages.area_entries(key, len(storage.areas), specs, opened)
                    _append_all(context, storage, areas, opened, undo)
        finally:
            _forget_announced(context, key, announced)
    return storages.of(context, snapshot)


def set_limit(context: Context, snapshot: SnapshotEntry, limit: int) -> StorageEntry:
    """Changes what the storage of a snapshot may grow to, in bytes. What it has already, it keeps.

    Raises UsageError, Unsupported for storage that was reserved whole, Failed for a broken snapshot.
    """
    if limit <= 0:
        raise UsageError(f"{limit} is not a positive number of bytes", subject="the limit")
    _wait_until_held(context, snapshot)
    with in_use(context, snapshot) as storage:
        if storage.areas and all(area.beneath is not None for area in storage.areas):
            text = "lies on a filtered device, where all of it was reserved when the snapshot was taken"
            advice = "`storage add` adds storage on another device"
            raise Unsupported(text, subject=storage.areas[0].path, advice=advice)
        storage = msgspec.structs.replace(storage, limit=limit)
        context.catalogue.put_storage(storage)
    return storage


def append(context: Context, storage: StorageEntry, area: AreaEntry, descriptor: int) -> StorageEntry:
    """Adds one area, for a caller that holds the storage's lock; `descriptor` is that of its file, under the name
    `area.descriptor` with the keeper.

    Raises OSError, IoRefused, and Failed; nothing has changed then, but when the io process has died or does not
    answer: `adopting.settle` sees to that.
    """
    n = len(storage.areas)
    larger = msgspec.structs.replace(storage, areas=[*storage.areas, area])
    records = storages.make_records(context, larger, n)
    try:
        context.catalogue.put_storage(larger)
        context.registry.adopt(storages.identity(area), descriptor)
        try:
            storages.give_area(context, larger, n, descriptor, records)
        except OSError:
            context.registry.release(storages.identity(area))
            context.catalogue.put_storage(storage)
            context.state.remove(naming.records_name(storage.key, n))
            raise
    finally:
        os.close(records)
    return larger


@contextmanager
def in_use(context: Context, snapshot: SnapshotEntry) -> Iterator[StorageEntry]:
    """Holds the lock of the storage of a snapshot, and gives it as it is now. Raises Failed for a broken snapshot."""
    with context.storage_locks.holding([snapshot.storage_key]):
        entry = context.catalogue.snapshot(snapshot.id)
        storage = context.catalogue.storage(snapshot.storage_key)
        if entry is None or storage is None or storage.released:
            raise NotFound("it has been destroyed meanwhile", subject=f"snapshot {snapshot.id}")
        state, why = report.condition(context, entry)
        if state is not SnapshotState.ACTIVE:
            text = f"is {state.value} ({why}): more storage does not bring it back"
            raise Failed(text, subject=f"snapshot {snapshot.id}", advice="destroy it and take another")
        if not adopting.is_held(context, storage.key):
            text = "its storage is not there again yet after a restart of the daemon"
            raise Busy(text, subject=f"snapshot {snapshot.id}", errno="EBUSY", advice="try again")
        yield storage


def _wait_until_held(context: Context, snapshot: SnapshotEntry) -> None:
    """A control process that has just been started may not have come to its storage."""
    end = time.monotonic() + _HELD_LIMIT
    while snapshot.lost is None and not adopting.is_held(context, snapshot.storage_key) and time.monotonic() < end:
        if context.catalogue.snapshot(snapshot.id) is None:
            return
        time.sleep(0.05)


def _append_all(
    context: Context, storage: StorageEntry, areas: Sequence[AreaEntry], opened: OpenAreas, undo: ExitStack
) -> None:
    """Ends with nothing left to undo, unless not even the first area could be added."""
    for area, found in zip(areas, opened.areas, strict=True):
        undo.callback(quietly, context.keeper.drop, area.descriptor)
        context.keeper.put(area.descriptor, found.fd)
    for n, (area, found) in enumerate(zip(areas, opened.areas, strict=True)):
        try:
            storage = append(context, storage, area, found.fd)
        except (OSError, BlksnapError) as error:
            if n == 0:
                raise
            undo.pop_all()
            _give_up(context, storage, areas[n:], opened)
            raise Failed(f"only {n} of {len(areas)} areas were added: {error}", subject=area.path) from None
    undo.pop_all()
    opened.close()


def _give_up(context: Context, storage: StorageEntry, areas: Sequence[AreaEntry], opened: OpenAreas) -> None:
    """What was opened for areas that could not be added, but for files that have others."""
    with ExitStack() as closing:
        held = cutting_back.held_files(context, areas, closing)
        for area in areas:
            quietly(context.keeper.drop, area.descriptor)
        opened.close()
        kept = storages.files_of_others(context, storage.key) | {storages.identity(area) for area in storage.areas}
        for warning in cutting_back.restore([area for area in areas if storages.identity(area) not in kept], held=held):
            _log.warning("%s", warning)


def _forget_announced(context: Context, key: str, announced: Sequence[AreaEntry]) -> None:
    with context.storage_locks.holding([key]):
        storage = context.catalogue.storage(key)
        if storage is not None:
            rest = [area for area in storage.announced if area not in announced]
            context.catalogue.put_storage(msgspec.structs.replace(storage, announced=rest))
