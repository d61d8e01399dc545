# SPDX-License-Identifier: MIT
"""A restarted control process takes its difference storages over, and ends what was broken off."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import msgspec

from blksnap_ublk.errors import Failed
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import naming, releasing, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context

_log = logging.getLogger(__name__)


def adopt(context: Context, storage: StorageEntry) -> None:
    """After a restart of this process: takes the descriptors back from the keeper. Raises Failed."""
    if storage.key in context.open_storages:
        return
    with ExitStack() as undo:
        for area in storage.areas:
            try:
                context.registry.acquire(storages.identity(area), partial(context.keeper.get, area.descriptor))
            except OSError as error:
                raise Failed("the storage is no longer held", subject=area.path, errno="ENOENT") from error
            undo.callback(context.registry.release, storages.identity(area))
        undo.pop_all()
    context.open_storages.add(storage.key)
    with context.storage_locks.holding([storage.key]):
        _settle_adopted(context, storage.key)


def settle(context: Context, storage: StorageEntry) -> StorageEntry:
    """Gives the io process the areas that it lacks because an operation was broken off; for a caller that holds the
    storage's lock. An area that it refuses is taken out of the catalogue.

    Raises Failed, OSError.
    """
    state = context.state.storage_state(naming.storage_state_name(storage.key))
    if state is None:
        return storage
    for n in range(len(state.areas), len(storage.areas)):
        try:
            _give_again(context, storage, n)
        except IoRefused as error:
            _log.error("%s: %s: a part of it is not used", storage.areas[n].path, error.strerror)
            unused = storage.areas[n:]
            for area in unused:
                context.registry.release(storages.identity(area))
            storage = msgspec.structs.replace(storage, areas=storage.areas[:n])
            context.catalogue.put_storage(storage)
            _restore_others(storage, unused)
            break
    return storage


def _give_again(context: Context, storage: StorageEntry, n: int) -> None:
    area = storage.areas[n]
    identity = storages.identity(area)
    descriptor = context.registry.acquire(identity, partial(context.keeper.get, area.descriptor))
    try:
        records = storages.make_records(context, storage, n)
        try:
            storages.give_area(context, storage, n, descriptor, records)
        finally:
            os.close(records)
    finally:
        context.registry.release(identity)


def _settle_adopted(context: Context, key: str) -> None:
    """After a restart: what `enlarging` had begun is ended or taken back."""
    storage = context.catalogue.storage(key)
    if storage is None:
        return
    storage = settle(context, storage)
    _restore_others(storage, storage.announced)
    context.catalogue.put_storage(msgspec.structs.replace(storage, announced=[]))
    known = {area.descriptor for area in storage.areas}
    for name in context.keeper.names():
        if name.startswith(naming.storage_descriptor_name(key, None)) and name not in known:
            context.keeper.drop(name)


def _restore_others(storage: StorageEntry, areas: Sequence[AreaEntry]) -> None:
    """Cuts the files of `areas` back, but those that the storage uses."""
    used = {storages.identity(area) for area in storage.areas}
    for warning in releasing.restore([area for area in areas if storages.identity(area) not in used]):
        _log.warning("%s", warning)
