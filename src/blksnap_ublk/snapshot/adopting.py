# SPDX-License-Identifier: MIT
"""A restarted control process takes its difference storages over, and ends what was broken off."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NoReturn

import msgspec

from blksnap_ublk.errors import BlksnapError, Failed
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import cutting_back, host_view, naming, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.storage import Identity
from blksnap_ublk.snapshot.storage.reopening import reopen

_CLAIM_LIMIT = 5.0  # seconds for a dead process to let go of a file
_log = logging.getLogger(__name__)


def adopt(context: Context, key: str, *, on_filtered: bool = False) -> None:
    """After a restart of this process: takes the descriptors of a storage back from the keeper, and ends what was
    broken off.

    What the keeper does not have any more is opened again, but without `on_filtered` for what lies on a filtered
    device, which may not be served yet. Raises Failed, OSError. Until all is done the storage is in `Context.unheld`,
    and this is to be called again.
    """
    storage = context.catalogue.storage(key)
    if storage is None or is_held(context, key):
        context.unheld.discard(key)
        return
    if key not in context.open_storages:
        context.unheld.add(key)
    with (
        suppress(_NotYetError),
        # Without the lock: recovery needs that before it serves the devices that this may wait for.
        holding(context, storage.areas, on_filtered=on_filtered) as undo,
        context.storage_locks.holding([key]),
    ):
        if is_held(context, key) or context.catalogue.storage(key) != storage:
            return  # another thread was here, or it is going
        put_again(context, storage.areas)
        if key not in context.open_storages:
            context.open_storages.add(key)
            undo.pop_all()
        _settle_adopted(context, storage)
        context.unheld.discard(key)


def is_held(context: Context, key: str) -> bool:
    """Whether this process has the descriptors of a storage, and nothing that was broken off is left of it."""
    return key in context.open_storages and key not in context.unheld


@contextmanager
def holding(context: Context, areas: Sequence[AreaEntry], *, on_filtered: bool = False) -> Iterator[ExitStack]:
    """Has the files of these areas open; what is given closes them. Raises Failed, OSError."""
    with ExitStack() as undo:
        for area in areas:
            context.registry.acquire(storages.identity(area), partial(_opened, context, area, on_filtered))
            undo.callback(context.registry.release, storages.identity(area))
        yield undo


def put_again(context: Context, areas: Sequence[AreaEntry]) -> None:
    """Gives the keeper what it lacks of the descriptors of areas that this process has open. Raises OSError."""
    names = set(context.keeper.names())
    for area in areas:
        if area.descriptor and area.descriptor not in names:
            names.add(area.descriptor)
            with descriptor_of(context, area) as descriptor:
                context.keeper.put(area.descriptor, descriptor)


@contextmanager
def descriptor_of(context: Context, area: AreaEntry) -> Iterator[int]:
    """That of the file of an area which this process has open. Raises OSError where it has not."""
    descriptor = context.registry.acquire(storages.identity(area), _gone)
    try:
        yield descriptor
    finally:
        context.registry.release(storages.identity(area))


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
            with ExitStack() as closing:
                held = cutting_back.held_files(context, unused, closing)
                for area in unused:
                    context.registry.release(storages.identity(area))
                storage = msgspec.structs.replace(storage, areas=storage.areas[:n])
                context.catalogue.put_storage(storage)
                _restore_others(context, storage, unused, held)
            break
    return storage


class _NotYetError(Exception):
    """A file on a filtered device cannot be opened before that is served."""


def _opened(context: Context, area: AreaEntry, on_filtered: bool) -> int:
    with suppress(OSError):
        return context.keeper.get(area.descriptor)
    if area.beneath is not None and not on_filtered:
        raise _NotYetError
    try:
        return reopen(host_view.find(area.path), storages.identity(area), _CLAIM_LIMIT)
    except (BlksnapError, OSError) as error:
        raise Failed(f"the storage is no longer held: {error}", subject=area.path, errno="ENOENT") from error


def _gone() -> NoReturn:
    raise OSError(errno.ENOENT, "the storage has been released")


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


def _settle_adopted(context: Context, storage: StorageEntry) -> None:
    """After a restart: what `enlarging` had begun is ended or taken back."""
    storage = settle(context, storage)
    known = {area.descriptor for area in storage.areas}
    prefix = naming.storage_descriptor_name(storage.key, None)
    unknown = [name for name in context.keeper.names() if name.startswith(prefix) and name not in known]
    with ExitStack() as closing:
        held: dict[Identity, int] = {}
        for name in unknown:
            descriptor = context.keeper.get(name)
            closing.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                held[Identity(DeviceNumber.of(status.st_dev), status.st_ino)] = descriptor
        announced = [area for area in storage.announced if area.beneath is None]
        _restore_others(context, storage, announced, held)
    context.catalogue.put_storage(msgspec.structs.replace(storage, announced=[]))
    for name in unknown:
        context.keeper.drop(name)


def _restore_others(
    context: Context, storage: StorageEntry, areas: Sequence[AreaEntry], held: Mapping[Identity, int]
) -> None:
    """Cuts the files of `areas` back, but those that this storage or another uses; `held`: descriptors of them."""
    used = {storages.identity(area) for area in storage.areas}
    others = storages.files_of_others(context, storage.key)
    unused = [area for area in areas if storages.identity(area) not in used]
    for warning in cutting_back.restore(unused, others, held):
        _log.warning("%s", warning)
