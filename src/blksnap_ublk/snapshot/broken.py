# SPDX-License-Identifier: MIT
"""Snapshots that break: each is told of once, by an event, and the catalogue keeps when and why."""

from __future__ import annotations

import logging
import threading
import time

from blksnap_ublk.forms import SnapshotState
from blksnap_ublk.snapshot import naming, report
from blksnap_ublk.snapshot.catalogue import Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.state_files import ImageStatus

_BROKEN = {ImageStatus.OVERFLOWN, ImageStatus.CORRUPTED}
_EVENTS = {SnapshotState.OVERFLOWN: "overflow", SnapshotState.CORRUPTED: "corrupted"}
_telling = threading.Lock()
_log = logging.getLogger(__name__)


def is_broken(context: Context, entry: SnapshotEntry) -> bool:
    """Not for a snapshot that is going or has gone since it was looked up."""
    if entry.lost is not None:
        return True
    states = [context.state.image_state(naming.image_state_name(image)) for image in entry.images]
    return any(found is not None and found.status in _BROKEN for found in states)


def tell(context: Context, entry: SnapshotEntry) -> SnapshotEntry:
    """The snapshot as it is now; the first time that it is found broken that is told.

    Never waits for an operation. Should this process die meanwhile, the next one tells of it again rather than never.
    """
    if entry.broken_at is not None or not is_broken(context, entry):
        return entry
    with _telling:
        current = context.catalogue.snapshot(entry.id)
        # A destroy by force ends its requests as a break would.
        if current is None or current.broken_at is not None or current.phase is not Phase.ACTIVE:
            return current or entry
        state, why = report.condition(context, current)
        if state is SnapshotState.ACTIVE or why is None:
            return current
        _log.error("snapshot %s is %s: %s", entry.id, state.value, why)
        context.emit(_EVENTS[state], snapshot=entry.id, device=naming.only_device(entry), error=why)
        context.catalogue.note_broken(entry.id, time.time(), why)
        return context.catalogue.snapshot(entry.id) or current
