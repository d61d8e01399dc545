# SPDX-License-Identifier: MIT
"""How fast copy-on-write may write to a difference storage, so that it leaves something to other users of the disk."""

from __future__ import annotations

import msgspec

from blksnap_ublk.errors import NotFound, UsageError
from blksnap_ublk.snapshot.catalogue import SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context

LOWEST = 1 << 20
"""Bytes per second. Below that writers would wait too long for a single large copy."""

_HIGHEST = 1 << 50


def check_copy_rate(rate: int) -> None:
    """Raises UsageError for a number of bytes per second that copies cannot be held to."""
    if not LOWEST <= rate <= _HIGHEST:
        advice = f"give at least {LOWEST} bytes (1M) a second, or none at all"
        raise UsageError(f"{rate} bytes a second is no rate for copies", subject="--copy-rate", advice=advice)


def set_copy_rate(context: Context, snapshot: SnapshotEntry, rate: int | None) -> StorageEntry:
    """The storage of a snapshot, which copies go to at `rate` bytes per second at most from soon on; None: no limit.

    Raises UsageError, NotFound when it has gone, OSError.
    """
    if rate is not None:
        check_copy_rate(rate)
    with context.storage_locks.holding([snapshot.storage_key]):
        storage = context.catalogue.storage(snapshot.storage_key)
        if storage is None:
            raise NotFound("no such snapshot", subject=snapshot.id, advice="it has been destroyed meanwhile")
        storage = msgspec.structs.replace(storage, copy_rate=rate)
        context.catalogue.put_storage(storage)
    return storage
