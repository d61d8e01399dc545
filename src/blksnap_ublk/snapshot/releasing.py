# SPDX-License-Identifier: MIT
"""The end of a difference storage: taken from the io process, its files closed and cut back to what they were."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from blksnap_ublk.errors import Busy, Failed
from blksnap_ublk.ioproc import messages
from blksnap_ublk.keeper.ring_locks import RingLocks
from blksnap_ublk.snapshot import cutting_back, naming, same_device, storages
from blksnap_ublk.snapshot.catalogue import SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.storage import wiping

_WIPE = 64 << 20  # bytes that are wiped before anybody looks up
_GIVE_BACK_LIMIT = 5.0  # seconds
_LATE_WRITES_LIMIT = 1.0  # seconds for the storage to end what a dead io process has sent it


def leave(context: Context, snapshot: SnapshotEntry) -> list[str]:
    """Takes a snapshot, whose images the io process has dropped, out of the catalogue, and with the last one of its
    storage the storage from the io process.

    For a caller that holds the locks of the devices. What is left to do, and may wait for other file systems, is for
    `finish`. Returns what could not be done, in words. Raises Failed, OSError; it may be called again then.
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
    if not storage.released:
        context.io.end(messages.CloseStorage(storage.key))
        refuse_late_writes(context, storage.areas[0].path if storage.areas else "the storage")
    if same_device.devices_beneath(storage):
        # It needs the locks of these devices, and helper processes do what may wait.
        return _give_back(context, storage)
    context.catalogue.put_storage(msgspec.structs.replace(storage, released=True))
    return []


def finish(context: Context, key: str) -> list[str]:
    """Wipes, closes and cuts back the files of a storage that was released; what could not be done, in words.

    For a caller without locks of devices: it may wait for file systems. Raises OSError.
    """
    with context.storage_locks.holding([key]):
        storage = context.catalogue.storage(key)
        return _give_back(context, storage) if storage is not None and storage.released else []


def wait_for_named(context: Context, specs: Sequence[Spec]) -> None:
    """For the files and devices in `specs` to be given back, where a storage that no snapshot uses any more has them.

    `filling` does that a moment after a snapshot has expired, or after control died in the midst of an operation. Who
    is about to use them waits for it, but not for long: another file of that storage may not answer.
    """
    end = time.monotonic() + _GIVE_BACK_LIMIT
    wanted = storages.named(specs)
    while any(wanted & storages.files(storage) for storage in _unused(context)) and time.monotonic() < end:
        time.sleep(0.05)


def _unused(context: Context) -> list[StorageEntry]:
    found, making = context.catalogue.storages(), set(context.making)
    used = {entry.storage_key for entry in context.catalogue.snapshots()}  # last: what leaves `making` has one by then
    return [storage for storage in found if storage.released or storage.key not in making | used]


def _give_back(context: Context, storage: StorageEntry) -> list[str]:
    warnings: list[str] = []
    if storage.wipe:
        warnings += _wipe(context, storage)
    files = [storages.identity(area) for area in storage.areas]
    storage = same_device.end(context, storage)
    through = [area for area in (*storage.areas, *storage.announced) if area.beneath is None]
    with ExitStack() as cutting:
        held = cutting_back.held_files(context, through, cutting)
        with ExitStack() as closing:
            warnings += same_device.give_back(context, storage, closing)
            storages.forget(context, storage)
            if storage.key in context.open_storages:
                context.open_storages.discard(storage.key)
                for file in files:
                    context.registry.release(file)
        warnings += cutting_back.restore(through, storages.files_of_others(context, storage.key), held)
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
        name = area.descriptor if area.beneath is None else naming.origin_descriptor_name(area.beneath)
        start = area.offset if area.physical is None else area.physical
        try:
            descriptor = context.keeper.get(name)
            try:
                for begin in range(start, start + length, _WIPE):
                    if context.io.lost():  # devices wait for the locks that are held here
                        text = "wiping was broken off, because the io process has died"
                        raise Failed(text, subject=area.path, advice="it is done again")
                    wiping.wipe(descriptor, [(begin, min(_WIPE, start + length - begin))])
            finally:
                os.close(descriptor)
        except OSError as error:
            warnings.append(f"{area.path}: could not be wiped: {error.strerror or error}")
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
    while locks.of_dead():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
