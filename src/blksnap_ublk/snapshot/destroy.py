# SPDX-License-Identifier: MIT
"""Destroying a snapshot, and taking apart what a failed attempt or a dead io process left of one."""

from __future__ import annotations

import logging

import msgspec

from blksnap_ublk.cbt import HistoryError
from blksnap_ublk.errors import BlksnapError, NotFound, from_os_error
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import create, disks, storages
from blksnap_ublk.snapshot.catalogue import ImageEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context

_log = logging.getLogger(__name__)


def destroy(context: Context, snapshot: SnapshotEntry, *, force: bool) -> list[str]:
    """Removes a snapshot; returns warnings. With `force` readers of its images get errors.

    Raises Busy naming who has an image open, or when a dead io process may still write to the storage; NotFound when it
    is gone meanwhile, Failed; a snapshot whose removal has begun is removed by the next attempt, or the next start.
    """
    with context.locks.holding(image.device for image in snapshot.images):
        return destroy_locked(context, snapshot, force=force)


def destroy_locked(context: Context, snapshot: SnapshotEntry, *, force: bool) -> list[str]:
    """The same for a caller that holds the locks of the devices."""
    entry = context.catalogue.snapshot(snapshot.id)
    if entry is None:
        raise NotFound("no such snapshot", subject=snapshot.id)
    warnings: list[str] = []
    for image in entry.images:
        if image.served is None or context.disks.state_of(image.served) is None:
            continue
        if not force:
            disks.refuse_used(image.served.ublk_id)
        users = disks.users(image.served.ublk_id)
        warnings += [f"/dev/ublkb{image.served.ublk_id}: {user} gets errors from now on" for user in users]
    if entry.lost is not None:
        storages.refuse_late_writes(context, entry.id)
    entry = msgspec.structs.replace(entry, phase=Phase.DESTROYING)
    context.catalogue.put_snapshot(entry)
    try:
        for image in entry.images:
            _end_image(context, image, force=force)
            context.io.end(messages.Drop(image.key))
        storages.drop(context, entry.storage)
    except OSError as error:
        raise from_os_error(error, subject=f"snapshot {entry.id}") from None
    warnings += forget(context, entry)
    context.emit("destroyed", snapshot=entry.id, device=entry.images[0].filtered if entry.images else None)
    return warnings


def forget(context: Context, entry: SnapshotEntry) -> list[str]:
    """The part of a removal that needs neither ublk nor the io process: histories, files, the catalogue."""
    for image in entry.images:
        history = context.histories.get(image.device)
        if history is not None and image.change_number in history.held:
            history.destroy(image.change_number)
            try:
                history.fold()
            except (OSError, HistoryError) as error:
                _log.warning("%s: change tracking keeps more than it needs: %s", image.filtered, error)
        context.state.remove(create.image_state_name(image))
    storages.forget(context, entry.storage)
    warnings = storages.release(context, entry.storage)
    context.state.remove(create.commit_name(entry.id))
    context.catalogue.remove_snapshot(entry.id)
    return warnings


def _end_image(context: Context, image: ImageEntry, *, force: bool) -> None:
    """Takes the image's disk away."""
    if image.served is None:
        return
    ublk_id = image.served.ublk_id
    if context.disks.state_of(image.served) is None:
        return
    if not force:
        disks.refuse_used(ublk_id)
    context.disks.stop(ublk_id)
    context.io.end(messages.FinishImage(image.key))
    context.disks.delete(ublk_id, in_use=force)


def try_destroy(context: Context, entry: SnapshotEntry) -> bool:
    """Removes what is left of a snapshot by force, whatever state it is in; False, and a log line, when that fails."""
    try:
        destroy_locked(context, entry, force=True)
    except BlksnapError as error:
        _log.error("snapshot %s: could not be removed: %s", entry.id, error)
        return False
    return True
