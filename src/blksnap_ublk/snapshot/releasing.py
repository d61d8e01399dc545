# SPDX-License-Identifier: MIT
"""The end of a difference storage: taken from the io process, its files closed and cut back to what they were."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from blksnap_ublk.errors import Busy
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.keeper.ring_locks import RingLocks
from blksnap_ublk.snapshot import host_view, naming, same_device, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.storage import wiping

_LATE_WRITES_LIMIT = 1.0  # seconds for the storage to end what a dead io process has sent it


def leave(context: Context, snapshot: SnapshotEntry) -> list[str]:
    """Takes a snapshot, whose images the io process has dropped, out of the catalogue, and with the last one of its
    storage the storage: its files are closed, and cut back where they were made longer for it.

    Returns what could not be done, in words. Raises Failed; it may be called again then.
    """
    key = snapshot.storage_key
    with context.storage_locks.holding([key]):
        warnings = []
        if all(other.id == snapshot.id for other in naming.snapshots_in(context.catalogue, key)):
            warnings = release(context, storages.of(context, snapshot))
        context.catalogue.remove_snapshot(snapshot.id)
    return warnings


def release(context: Context, storage: StorageEntry) -> list[str]:
    """Ends a storage that no snapshot uses, for a caller that holds its lock; as `leave`."""
    context.io.end(messages.CloseStorage(storage.key))
    warnings: list[str] = []
    if same_device.devices_beneath(storage):
        refuse_late_writes(context, storage.areas[0].path if storage.areas else "the storage")
    if storage.wipe:
        warnings += _wipe(context, storage)
    files = [storages.identity(area) for area in storage.areas]
    storage = same_device.end(context, storage)
    with ExitStack() as closing:
        warnings += same_device.give_back(context, storage, closing)
        storages.forget(context, storage)
        if storage.key in context.open_storages:
            context.open_storages.discard(storage.key)
            for file in files:
                context.registry.release(file)
    warnings += restore([area for area in (*storage.areas, *storage.announced) if area.beneath is None])
    context.catalogue.remove_storage(storage.key)
    return warnings


def _wipe(context: Context, storage: StorageEntry) -> list[str]:
    """Overwrites what was ever written to; what could not be, in words."""
    state = context.state.storage_state(naming.storage_state_name(storage.key))
    written = state.high_water if state is not None else sys.maxsize
    warnings = []
    in_place: dict[str, bool] = {}
    for area in storage.areas:
        places = area.length // storage.unit
        length = min(places, written) * storage.unit
        written -= min(places, written)
        if not length:
            continue
        if area.beneath is not None and area.descriptor not in in_place:
            error = same_device.moved(context, [each for each in storage.areas if each.descriptor == area.descriptor])
            in_place[area.descriptor] = error is None
            if error is not None:
                warnings.append(f"{area.path}: was not wiped: {error}")
        if not in_place.get(area.descriptor, True):
            continue
        name = area.descriptor if area.beneath is None else f"origin:{area.beneath}"
        start = area.offset if area.physical is None else area.physical
        try:
            descriptor = context.keeper.get(name)
            try:
                wiping.wipe(descriptor, [(start, length)])
            finally:
                os.close(descriptor)
        except OSError as error:
            warnings.append(f"{area.path}: could not be wiped: {error.strerror or error}")
    return list(dict.fromkeys(warnings))


def restore(areas: Sequence[AreaEntry]) -> list[str]:
    """Cuts files back that were made longer, and removes those that were made; what could not be done, in words."""
    warnings = []
    for area in areas:
        if area.former_size is not None:
            try:
                _restore(area)
            except OSError as error:
                warnings.append(f"{area.path}: could not be cut back to its former size: {error.strerror}")
    return list(dict.fromkeys(warnings))


def refuse_late_writes(context: Context, subject: str) -> None:
    """For a storage of an io process that has died: its space must not be given back before its last write has ended.

    Waits a moment for that, then raises Busy.
    """
    if not late_writes_end(context, _LATE_WRITES_LIMIT):
        text = "its storage does not answer: writes of the io process that died are still under way"
        raise Busy(text, subject=subject, errno="EBUSY", advice="try again when they have ended")


def late_writes_end(context: Context, seconds: float) -> bool:
    """Whether all writes to storage of io processes that have died are done, at the latest after so many seconds."""
    locks = RingLocks(context.state.directory)
    end = time.monotonic() + seconds
    while len(locks.held()) > 1:  # one is that of the io process of now
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _restore(area: AreaEntry) -> None:
    """Only if the path still leads to the same file."""
    assert area.former_size is not None
    path = host_view.find(area.path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        device = DeviceNumber.of(status.st_dev)
        if ((device.major, device.minor), status.st_ino) != (area.filesystem, area.inode):
            return
        if area.former_size < 0:
            os.unlink(path)
        elif status.st_size > area.former_size:
            os.ftruncate(descriptor, area.former_size)
    except FileNotFoundError:
        pass
    finally:
        os.close(descriptor)
