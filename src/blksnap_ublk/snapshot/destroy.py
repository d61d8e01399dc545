# SPDX-License-Identifier: MIT
"""Destroying a snapshot, and taking apart what a failed attempt or a dead io process left of one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from blksnap_ublk.cbt import HistoryError
from blksnap_ublk.errors import BlksnapError, Busy, Failed, NotFound, from_os_error
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import disks, naming, releasing, same_device, taking
from blksnap_ublk.snapshot.catalogue import ImageEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.state_files import ImageStatus

_HAND_OVER_LIMIT = 600.0  # seconds in which an image hands to older ones what they need; it comes in portions
TRY_LIMIT = 60.0  # the same where others wait for the end of the attempt
_AT_ONCE = 8  # ublk devices that are removed at the same time
_log = logging.getLogger(__name__)


def destroy(context: Context, snapshot: SnapshotEntry, *, force: bool) -> list[str]:
    """Removes a snapshot, whatever others there are; returns warnings. With `force` readers of its images get errors.

    Raises Busy naming who has an image open, or when a dead io process may still write to the storage; NotFound when it
    is gone meanwhile, Failed; a snapshot whose removal has begun is removed by the next attempt, or the next start.
    """
    with context.locks.holding(devices_of(context, snapshot)):
        warnings = destroy_locked(context, snapshot, force=force)
    return warnings + releasing.finish(context, snapshot.storage_key)


def devices_of(context: Context, snapshot: SnapshotEntry) -> set[str]:
    """The keys of the devices whose locks an operation on it needs: its own, and those beneath which its storage is."""
    beneath = same_device.devices_beneath(context.catalogue.storage(snapshot.storage_key))
    known = {key for key in beneath if context.catalogue.device(key) is not None}
    return {*snapshot.members, *(image.device for image in snapshot.images), *known}


def _refuse_before_younger(context: Context, entry: SnapshotEntry) -> None:
    """Raises Busy while a younger snapshot, which reads through the same maps, is half removed: it has to go first."""
    serials = {image.device: image.serial for image in entry.images}
    for other in naming.snapshots_in(context.catalogue, entry.storage_key):
        for image in other.images:
            if image.serial <= serials.get(image.device, image.serial):
                continue
            state = context.state.image_state(naming.image_state_name(image))
            if state is not None and state.status is ImageStatus.GONE:
                text = f"the removal of snapshot {other.id}, which is younger, has not ended"
                raise Busy(text, subject=f"snapshot {entry.id}", errno="EBUSY", advice="try again soon")


def destroy_locked(
    context: Context, snapshot: SnapshotEntry, *, force: bool, limit: float = _HAND_OVER_LIMIT
) -> list[str]:
    """The same for a caller that holds the locks of the devices. `limit`: seconds for an image to leave its device.

    Files of the storage are given back by `releasing.finish`: by the caller once it has let go of the locks, or else by
    `filling`.
    """
    entry = context.catalogue.snapshot(snapshot.id)
    if entry is None:
        raise NotFound("no such snapshot", subject=snapshot.id)
    warnings = _users(context, entry, force=force)
    _refuse_before_younger(context, entry)
    if entry.lost is not None:
        releasing.refuse_late_writes(context, f"snapshot {entry.id}")
    was_told_of = entry.phase is not Phase.CREATING
    context.unfinished.add(entry.id)
    entry = msgspec.structs.replace(entry, phase=Phase.DESTROYING)
    context.catalogue.put_snapshot(entry)
    try:
        if entry.id in context.unsettled:
            taking.settle(context, entry)
            context.unsettled.discard(entry.id)
        _end_disks(context, entry.images, force=force)
        for image in entry.images:
            context.io.end(messages.Drop(image.key), limit)
    except HistoryError as error:
        raise Failed(str(error), subject=f"snapshot {entry.id}") from None
    except OSError as error:
        raise from_os_error(error, subject=f"snapshot {entry.id}") from None
    for image in entry.images:
        context.state.remove(naming.image_state_name(image))
    warnings += releasing.leave(context, entry)
    context.unfinished.discard(entry.id)
    context.state.remove(naming.commit_name(entry.id))
    with suppress(OSError):
        context.disks.links.snapshot_gone(entry.id)
    for image in entry.images:
        _release_number(context, image)
    devices = [image.filtered for image in entry.images]
    if was_told_of:
        context.emit("destroyed", snapshot=entry.id, device=naming.only_device(entry), devices=devices)
    return warnings


def _users(context: Context, entry: SnapshotEntry, *, force: bool) -> list[str]:
    """Says who gets errors; without `force` raises Busy before anything is ended."""
    warnings = []
    for image in entry.images:
        if image.served is None or context.disks.state_of(image.served) is None:
            continue
        if not force:
            disks.refuse_used(image.served.ublk_id)
        else:
            users = disks.users(image.served.ublk_id)
            warnings += [f"/dev/ublkb{image.served.ublk_id}: {user} gets errors from now on" for user in users]
    return warnings


def _end_disks(context: Context, images: Sequence[ImageEntry], *, force: bool) -> None:
    """Takes the disks of all images away, several at the same time; the first error is raised when all have ended."""
    if not images:
        return
    with ThreadPoolExecutor(min(len(images), _AT_ONCE), thread_name_prefix="image") as threads:
        ending = [threads.submit(_end_disk, context, image, force=force) for image in images]
    for each in ending:
        each.result()


def _end_disk(context: Context, image: ImageEntry, *, force: bool) -> None:
    """Also where somebody else has removed the disk: the io process holds what is left of it."""
    is_there = image.served is not None and context.disks.state_of(image.served) is not None
    if image.served is not None and is_there:
        if force:
            # Its requests may wait for a storage that does not answer, and the disk waits for them.
            context.io.end(messages.EndImage(image.key))
        context.disks.stop(image.served.ublk_id)
    context.io.end(messages.FinishImage(image.key))
    if image.served is not None and is_there:
        context.disks.delete(image.served.ublk_id, in_use=force)


def _release_number(context: Context, image: ImageEntry) -> None:
    """Its changes stay known; what is no longer told apart is folded. Should room lack, the next start does it."""
    history = context.histories.get(image.device)
    if history is None or image.change_number not in history.held:
        return
    try:
        history.destroy(image.change_number)
        history.fold()
    except (OSError, HistoryError) as error:
        _log.warning("%s: change tracking keeps more than it needs: %s", image.filtered, error)


def try_destroy(context: Context, entry: SnapshotEntry) -> bool:
    """Removes what is left of a snapshot by force, whatever state it is in; False, and a log line, when that fails."""
    try:
        destroy_locked(context, entry, force=True, limit=TRY_LIMIT)
    except (OSError, BlksnapError) as error:
        _log.error("snapshot %s: could not be removed: %s", entry.id, error)
        return False
    return True
