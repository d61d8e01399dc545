# SPDX-License-Identifier: MIT
"""What changed on a device: questions to its history, and forcing blocks into the next increment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk import forms
from blksnap_ublk.cbt import Changes, Cursor, History, NoSuchSnapshot
from blksnap_ublk.errors import Failed, NotFound, Untrusted, UsageError, errno_symbol
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import naming, report
from blksnap_ublk.snapshot.catalogue import DeviceEntry, SnapshotEntry
from blksnap_ublk.snapshot.context import Context


def show(context: Context, device: DeviceEntry, since: str | None, until: str | None) -> Changes:
    """What changed after the cursor `since` (None: since tracking began) up to snapshot `until` (None: the last one).

    Raises UsageError for text that is no cursor, NotFound for a snapshot that is none of this device, Untrusted when
    `until` is a broken snapshot: an increment must not be copied from its image.
    """
    cursor = None
    if since is not None:
        try:
            cursor = Cursor.parse(since)
        except ValueError as error:
            raise UsageError(str(error), subject="--since") from None
    number = None
    history = history_of(context, device)
    if until is not None:
        snapshot = naming.find_snapshot(context.catalogue, until)
        number = _number_in(snapshot, device)
        _refuse_broken(context, snapshot)
    else:
        for snapshot in naming.snapshots_of(context.catalogue, device.key):
            if _number_in(snapshot, device) == history.number:
                _refuse_broken(context, snapshot)
    try:
        return history.changes(cursor, number)
    except NoSuchSnapshot as error:
        raise NotFound(str(error), subject=naming.block_path(device)) from None


def describe(context: Context, device: DeviceEntry) -> forms.ChangesInfo:
    """The state of change tracking now."""
    history = history_of(context, device)
    return forms.ChangesInfo(
        device=naming.block_path(device),
        generation=str(history.generation),
        change_number=history.number,
        tracking_block=history.tracking_block,
        blocks=history.blocks,
        changed_blocks=history.active.count(),
    )


def last_change(context: Context, device: DeviceEntry) -> NDArray[np.uint32]:
    """For each block the change number of the interval in which it last changed, as of the last snapshot."""
    return history_of(context, device).last_change()


def mark(context: Context, device: DeviceEntry, ranges: Sequence[forms.Range]) -> int:
    """Makes ranges (bytes) part of the next increment; how many bytes that is in whole tracking blocks.

    Raises UsageError for a range outside of the device.
    """
    for each in ranges:
        if each.start < 0 or each.length <= 0 or each.start + each.length > device.size:
            text = f"is empty or not within the {device.size} bytes of {naming.block_path(device)}"
            raise UsageError(text, subject=f"{each.start}+{each.length}")
    with context.locks.holding([device.key]):
        try:
            for begin in range(0, len(ranges), _RANGES_A_MESSAGE):
                piece = [(each.start, each.length) for each in ranges[begin : begin + _RANGES_A_MESSAGE]]
                context.io.call(messages.Mark(device.key, piece))
        except IoRefused as error:
            text = error.strerror or str(error)
            raise Failed(text, subject=naming.block_path(device), errno=errno_symbol(error.errno)) from None
    block = device.tracking_block
    starts = np.array([each.start // block for each in ranges], np.int64)
    ends = np.array([-(-(each.start + each.length) // block) for each in ranges], np.int64)
    return joined_length(starts, ends) * block


_RANGES_A_MESSAGE = 1 << 12


def history_of(context: Context, device: DeviceEntry) -> History:
    """The history of a device. Raises NotFound when it was detached meanwhile."""
    history = context.histories.get(device.key)
    if history is None:
        raise NotFound("has been detached meanwhile", subject=device.origin)
    return history


def _number_in(snapshot: SnapshotEntry, device: DeviceEntry) -> int:
    number = next((image.change_number for image in snapshot.images if image.device == device.key), None)
    if number is None:
        raise NotFound(f"the snapshot has no image of {naming.block_path(device)}", subject=snapshot.id)
    return number


def _refuse_broken(context: Context, snapshot: SnapshotEntry) -> None:
    state, error = report.condition(context, snapshot)
    if error is not None:
        raise Untrusted(f"the snapshot is {state.value}: {error}", subject=snapshot.id, advice="take another one")


def joined_length(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> int:
    """How many blocks are in any of the ranges [start, end)."""
    if not len(starts):
        return 0
    order = np.argsort(starts)
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    covered = ends - np.maximum(starts, np.concatenate(([starts[0]], ends[:-1])))
    return int(np.maximum(covered, 0).sum())
