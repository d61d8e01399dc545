# SPDX-License-Identifier: MIT
"""Snapshots that are given up: nothing else suffers from it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import naming
from blksnap_ublk.snapshot.catalogue import ImageEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.ublk.device_info import DeviceState as KernelState

_AT_ONCE = 8  # disks that are removed at the same time
_log = logging.getLogger(__name__)


def lose(context: Context, snapshot_id: str, why: str) -> None:
    """Marks a snapshot as corrupted, once, and tells its users; one that was never shown is to be removed.

    Raises Failed when the io process has gone, OSError.
    """
    snapshot = context.catalogue.snapshot(snapshot_id)
    if snapshot is None or snapshot.lost is not None:
        return
    _log.error("snapshot %s is lost: %s", snapshot.id, why)
    if snapshot.phase is Phase.ACTIVE:
        broken = msgspec.structs.replace(snapshot, lost=why, broken_at=time.time(), broken_why=why)
    else:
        # Should the rest of its removal have to wait, it can be seen, and removed by its users.
        broken = msgspec.structs.replace(snapshot, lost=why, phase=Phase.DESTROYING)
    # First of all, so that nobody reads from it whatever comes.
    for image in snapshot.images:
        context.io.end(messages.EndImage(image.key))
    context.stop_waiting(snapshot.id)
    context.catalogue.put_snapshot(broken)
    if snapshot.phase is Phase.ACTIVE:
        context.emit("corrupted", snapshot=snapshot.id, device=naming.only_device(snapshot), error=why)


def lose_with_older(context: Context, snapshot: SnapshotEntry, image: ImageEntry, why: str) -> None:
    """For an image that is not there any more: older ones of its chain may have read from its map.

    Raises as `lose`.
    """
    for other in context.catalogue.snapshots():
        if other.storage_key != snapshot.storage_key or other.id == snapshot.id or other.phase is not Phase.ACTIVE:
            continue
        if any(each.device == image.device and each.change_number < image.change_number for each in other.images):
            lose(context, other.id, f"it shared old data with snapshot {snapshot.id}, which is lost: {why}")
    lose(context, snapshot.id, why)


def end_disks(context: Context, snapshot: SnapshotEntry) -> bool:
    """Removes the disks of a lost snapshot's images; False, and nothing is done, while their last I/O is under way.

    Raises BlksnapError, OSError.
    """
    served = [image.served for image in snapshot.images if image.served is not None]
    states = {each.ublk_id: context.disks.state_of(each) for each in served}
    there = [ublk_id for ublk_id, state in states.items() if state is not None]
    known = {report.image: report for report in context.io.inventory().images}
    try:
        for image in snapshot.images:
            report = known.get(image.key)
            alive = report is not None and report.ublk_id is not None
            if image.served is not None and states[image.served.ublk_id] is KernelState.QUIESCED and not alive:
                context.disks.begin_recovery(image.served.ublk_id, 0)
    except TimeoutError:
        return False
    for image in snapshot.images:
        # Its requests may wait for a storage that does not answer, and the disk waits for them.
        context.io.end(messages.EndImage(image.key))
    if there:
        with ThreadPoolExecutor(min(len(there), _AT_ONCE), thread_name_prefix="lost-image") as threads:
            list(threads.map(context.disks.stop, there))
    for image in snapshot.images:
        context.io.end(messages.FinishImage(image.key))
        if image.served is not None and image.served.ublk_id in there:
            context.disks.delete(image.served.ublk_id, in_use=True)
    # Their ids are free for other devices.
    images = [msgspec.structs.replace(image, served=None) for image in snapshot.images]
    current = context.catalogue.snapshot(snapshot.id) or snapshot
    context.catalogue.put_snapshot(msgspec.structs.replace(current, images=images))
    return True
