# SPDX-License-Identifier: MIT
"""Images that a dead io process left: put back into the sets of their devices, and served again."""

from __future__ import annotations

import errno
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import create, destroy, naming
from blksnap_ublk.snapshot.catalogue import ImageEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.recovery import losing
from blksnap_ublk.ublk.device_info import DeviceState as KernelState

REMOVED = "the disk of its image was removed by somebody else"
_AT_ONCE = 8  # images that are served again at the same time
_GIVE_UP = 60.0  # seconds in which those that cannot be served again are tried
_log = logging.getLogger(__name__)


def adopt(context: Context, snapshot: SnapshotEntry, image: ImageEntry) -> None:
    """Makes an image the youngest of its device. Raises IoRefused, Failed, OSError, HistoryError."""
    with ExitStack() as closing:
        files = [context.state.open(naming.image_state_name(image))]
        closing.callback(os.close, files[0])
        history = context.histories[image.device]
        if snapshot.phase is Phase.ACTIVE or image.change_number in history.held:
            for path in history.bitmaps_around(image.change_number):
                files.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
                closing.callback(os.close, files[-1])
        message = messages.OpenImage(
            image.key, image.device, snapshot.storage_key, image.serial, size=image.size, adopt=True
        )
        context.io.call(message, files)


def serve_waiting(context: Context) -> None:
    """Those of snapshots in `Context.waiting` whose devices are served, once the sweep has ended.

    Snapshots that somebody else is about to change are passed over. Raises Failed when the io process has gone.
    """
    for snapshot_id in list(context.waiting):
        snapshot = context.catalogue.snapshot(snapshot_id)
        if snapshot is None:
            context.stop_waiting(snapshot_id)
            continue
        with context.locks.trying(destroy.devices_of(context, snapshot)) as held:
            if held:
                serve(context, snapshot_id)


def serve(context: Context, snapshot_id: str) -> None:
    """The images of one snapshot, for a caller that holds the locks of its devices.

    One whose disk is gone loses it; so does one that could not be served again for a long time.
    """
    snapshot = context.catalogue.snapshot(snapshot_id)
    if snapshot is None or snapshot.lost is not None or snapshot.phase is not Phase.ACTIVE:
        context.stop_waiting(snapshot_id)
        return
    if any(image.device in context.conditions for image in snapshot.images):
        return
    reports = {report.image: report for report in context.io.inventory().images}

    def serve_one(image: ImageEntry) -> bool:
        report = reports.get(image.key)
        return _serve(context, image, armed=report is not None and report.serving)

    try:
        with ThreadPoolExecutor(min(len(snapshot.images), _AT_ONCE), thread_name_prefix="image") as threads:
            done = list(threads.map(serve_one, snapshot.images))
    except _RemovedError:
        losing.lose(context, snapshot_id, REMOVED)
        return
    except (BlksnapError, OSError) as error:
        if not context.io.lost():
            _refused(context, snapshot_id, error)
        return
    context.refused.pop(snapshot_id, None)
    if all(done):
        context.stop_waiting(snapshot_id)
        context.emit("recovered", snapshot=snapshot_id, device=naming.only_device(snapshot))


def all_served(context: Context, snapshot: SnapshotEntry, inventory: messages.Inventory) -> bool:
    """Whether users of its images are served, also as far as the kernel knows."""
    serving = {report.image for report in inventory.images if report.taken and report.serving}
    return all(
        image.key in serving
        and image.served is not None
        and context.disks.state_of(image.served) is not KernelState.QUIESCED
        for image in snapshot.images
    )


class _RemovedError(Exception):
    """There is no disk any more that could be served."""


def _refused(context: Context, snapshot_id: str, error: Exception) -> None:
    """May be a shortage, which ends, or the death of the io process: the kernel closes what it had one after another,
    and its devices may be gone before the connection is."""
    now = time.monotonic()
    since = context.refused.setdefault(snapshot_id, now)
    if since == now:
        _log.warning("snapshot %s: its images cannot be served again yet, which is tried again: %s", snapshot_id, error)
    elif now - since > _GIVE_UP:
        losing.lose(context, snapshot_id, f"its images cannot be served again: {error}")


def _serve(context: Context, image: ImageEntry, *, armed: bool) -> bool:
    """False where it has to wait."""
    served = image.served
    state = None if served is None else context.disks.state_of(served)
    if served is None or state in (None, KernelState.DEAD):
        raise _RemovedError
    if armed and state is KernelState.LIVE:
        return True
    if not armed:
        try:
            context.disks.begin_recovery(served.ublk_id, 0)
            context.io.call(create.serve_image_message(image.key, served))
        except TimeoutError:
            return False
        except IoRefused as error:
            if error.errno == errno.EBUSY:
                return False
            raise
    context.disks.end_recovery(served.ublk_id, context.io.pid)
    return True
