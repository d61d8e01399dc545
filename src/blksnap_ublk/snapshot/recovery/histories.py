# SPDX-License-Identifier: MIT
"""The change histories of devices: opened at the start, told of instants that came, begun again where damaged."""

from __future__ import annotations

import logging
import os
import struct

from blksnap_ublk.cbt import History, HistoryDamaged, HistoryError
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.snapshot import naming, taking
from blksnap_ublk.snapshot.catalogue import DeviceEntry, ImageEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.state_files import swallowed_bytes

DAMAGED = "damaged"
_log = logging.getLogger(__name__)


def open_all(context: Context, devices: list[DeviceEntry]) -> None:
    """Those that are not open yet. A device that is about to go needs none."""
    for device in devices:
        if device.key in context.histories:
            continue
        try:
            context.histories[device.key] = History.open(context.state.path(f"device-{device.key}"))
        except (HistoryDamaged, OSError) as error:
            if device.phase is Phase.ACTIVE:
                _log.error("%s: its change history cannot be read: %s", device.origin, error)
                try_fresh(context, device, DAMAGED)


def settle_all(context: Context, snapshots: list[SnapshotEntry], served: set[str]) -> None:
    """Rolls takes that were broken off forward or back. `served`: the keys of devices that an io process has.

    Where that fails for others, their histories begin again.
    """
    for snapshot in snapshots:
        if snapshot.phase is not Phase.CREATING and snapshot.id not in context.unsettled:
            continue
        try:
            taking.settle(context, snapshot)
            context.unsettled.discard(snapshot.id)
        except (HistoryError, OSError) as error:
            _log.error("snapshot %s: whether it was taken cannot be told: %s", snapshot.id, error)
            context.unsettled.add(snapshot.id)
            members = [context.catalogue.device(image.device) for image in snapshot.images]
            devices = [each for each in members if each is not None]
            if any(device.key in served for device in devices):
                continue
            begun = [try_fresh(context, device, DAMAGED) for device in devices]
            if all(begun):
                context.unsettled.discard(snapshot.id)


def begin_again(context: Context, device: DeviceEntry, reason: str) -> None:
    """A history that knows of nothing, and no swallowed trims, for a device that no io process serves.

    Change numbers go on, snapshots stay held. Raises OSError, HistoryError, Failed.
    """
    directory = context.state.path(f"device-{device.key}")
    if not directory.is_dir():
        context.state.remove(directory.name)
    directory.mkdir(mode=0o700, exist_ok=True)
    taken = [image for snapshot in context.catalogue.snapshots() for image in _taken(context, snapshot, device.key)]
    numbers = {image.change_number for image in taken}
    if (former := context.histories.pop(device.key, None)) is not None:
        context.ended_histories[device.key] = (former.number, former.generation)
    del former  # with its mapping, which takes the room that the next one needs
    number, generation = context.ended_histories.get(device.key, (0, None))
    last = max(numbers | {number})
    context.histories[device.key] = History.create(
        directory,
        device.size,
        device.tracking_block,
        number=last,
        held=numbers,
        reason=reason,
        former=None if generation is None else (generation, reason),
    )
    context.ended_histories.pop(device.key, None)
    os.close(context.state.create(swallowed_name(device), swallowed_bytes(device.size, device.tracking_block)))
    _log.error("%s: everything counts as changed (%s)", device.origin, reason)


def try_fresh(context: Context, device: DeviceEntry, reason: str) -> bool:
    """`begin_again`; False, and a log line, where that fails."""
    try:
        begin_again(context, device, reason)
    except (BlksnapError, OSError, HistoryError, ValueError, struct.error) as error:
        _log.error("%s: no change history can be begun: %s", device.origin, error)
        return False
    return True


def swallowed_name(device: DeviceEntry) -> str:
    """The state file of the trims that were swallowed."""
    return f"device-{device.key}/swallowed"


def ensure_swallowed(context: Context, device: DeviceEntry) -> None:
    """Trims may be forgotten: a file of another length is begun again. Raises OSError, Failed."""
    path = context.state.path(swallowed_name(device))
    length = swallowed_bytes(device.size, device.tracking_block)
    if not path.is_file() or path.stat().st_size != length:
        os.close(context.state.create(swallowed_name(device), length))


def _taken(context: Context, snapshot: SnapshotEntry, key: str) -> list[ImageEntry]:
    """The images of a device that may have been taken, and are there still."""
    try:
        came = taking.instant_came(context, snapshot)
    except OSError:
        came = True
    if came is False or (came is None and snapshot.phase is Phase.CREATING):
        return []
    return [
        image
        for image in snapshot.images
        if image.device == key
        and (snapshot.phase is not Phase.DESTROYING or context.state.path(naming.image_state_name(image)).exists())
    ]
