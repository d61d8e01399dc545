# SPDX-License-Identifier: MIT
"""A difference storage that a dead io process left is given to its successor."""

from __future__ import annotations

import os
from contextlib import ExitStack

from blksnap_ublk.errors import BlksnapError, Failed
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import adopting, naming, storages
from blksnap_ublk.snapshot.catalogue import StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.state_files import records_bytes


def adopt(context: Context, key: str, known: messages.StorageReport | None) -> None:
    """`known`: as the io process has it, where this was broken off before.

    Raises BlksnapError, OSError when it cannot be had again; the io process does not have it then.
    """
    with context.storage_locks.holding([key]):
        storage = context.catalogue.storage(key)
        if storage is None:
            raise Failed("its catalogue entry is damaged")
        try:
            through = [area for area in storage.areas if area.beneath is None]
            with adopting.holding(context, through):
                adopting.put_again(context, through)
                _adopt(context, storage, known)
            storages.tell_behaviour(context, storage, sum(storages.used_bytes(context, storage)[0]))
        except (BlksnapError, OSError):
            if not context.io.lost():
                context.io.end(messages.CloseStorage(key))
            raise


def _adopt(context: Context, storage: StorageEntry, known: messages.StorageReport | None) -> None:
    state = context.state.storage_state(naming.storage_state_name(storage.key))
    if known is None:
        if state is None:
            raise Failed("its state cannot be read")
        descriptor = context.state.open(naming.storage_state_name(storage.key))
        try:
            context.io.call(messages.OpenStorage(storage.key, storage.unit, adopt=True), [descriptor])
        finally:
            os.close(descriptor)
    former = len(state.areas) if state is not None else 0
    if former > len(storage.areas):
        raise Failed("its areas are not all known")
    for n in range(len(known.areas) if known is not None else 0, len(storage.areas)):
        whole = _records_are_whole(context, storage, n)
        if n >= former and not whole:
            return  # an area that was about to be added, and has to be begun again
        if not whole:
            raise Failed("a part of its records is missing", subject=storage.areas[n].path)
        try:
            _give(context, storage, n)
        except IoRefused:
            if n < former:
                raise
            return


def _records_are_whole(context: Context, storage: StorageEntry, n: int) -> bool:
    path = context.state.path(naming.records_name(storage.key, n))
    return path.is_file() and path.stat().st_size == records_bytes(storage.areas[n].length, storage.unit)


def _give(context: Context, storage: StorageEntry, n: int) -> None:
    area = storage.areas[n]
    with ExitStack() as closing:
        records = context.state.open(naming.records_name(storage.key, n))
        closing.callback(os.close, records)
        # What lies beneath a filtered device is not written through its file.
        descriptor = -1 if area.beneath is not None else closing.enter_context(adopting.descriptor_of(context, area))
        storages.give_area(context, storage, n, descriptor, records)
