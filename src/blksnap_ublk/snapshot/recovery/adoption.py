# SPDX-License-Identifier: MIT
"""All that an io process that has died left is made known to the one of now: devices, storages, maps, images."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from blksnap_ublk.cbt import HistoryError
from blksnap_ublk.errors import BlksnapError, Failed
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import naming, taking
from blksnap_ublk.snapshot.catalogue import DeviceEntry, ImageEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.recovery import devices, histories, images, kept_storages, losing, portions
from blksnap_ublk.snapshot.state_files import ImageStatus

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Left:
    """An image that may hold old data. `missing`: why it cannot be had again."""

    snapshot: SnapshotEntry
    image: ImageEntry
    missing: str | None = None


def adopt(
    context: Context, served: list[DeviceEntry], snapshots: list[SnapshotEntry], inventory: messages.Inventory
) -> None:
    """What of it the io process has already, because this was broken off, is passed over.

    For a caller that holds all locks, and `map_memory.halted`. What cannot be adopted is lost. Raises Failed when the
    io process has gone.
    """
    if inventory.lifeboat:
        _begin_again(context, served, snapshots, inventory)
    devices.open_all(context, served, inventory)
    left = _left(context, snapshots, inventory)
    if _unknown_images(context, inventory):
        # Any map may be one that lacks what an unknown one has.
        left = [Left(each.snapshot, each.image, "the catalogue entry of another snapshot is damaged") for each in left]
    left = _with_map_memory(context, left, inventory)
    left = _with_storages(context, left, inventory)
    # In the order in which they were taken; the oldest of a device come first.
    for each in sorted(left, key=lambda each: (each.image.device, each.image.change_number)):
        why = each.missing or _adopted(context, each)
        if why is not None:
            _give_up(context, each, why)
    _lose_going(context, snapshots)
    _finish_later(context, snapshots)


def _left(context: Context, snapshots: list[SnapshotEntry], inventory: messages.Inventory) -> list[Left]:
    """Those that the io process lacks, but for what it has dropped itself.

    Of a device that it serves it had everything, since that comes last: a control process that died before it removed
    the state of an image has left it then, and no other image reads from it any more.
    """
    known = {report.image for report in inventory.images}
    serving = {report.device for report in inventory.devices if report.serving}
    found = []
    for snapshot in snapshots:
        has = known if snapshot.phase is Phase.ACTIVE else known | _keys_on(snapshot, serving)
        lacking = [image for image in snapshot.images if image.key not in has]
        try:
            came = taking.instant_came(context, snapshot)
        except OSError as error:
            found += [Left(snapshot, image, str(error.strerror)) for image in lacking]
            continue
        if came is False or (came is None and snapshot.phase is Phase.CREATING):
            continue  # nothing was ever preserved for it
        for image in lacking:
            there = context.state.path(naming.image_state_name(image)).is_file()
            if there:
                found.append(Left(snapshot, image))
            elif snapshot.phase is not Phase.DESTROYING:
                found.append(Left(snapshot, image, f"the state of the image of {image.origin} is gone"))
    return found


def _keys_on(snapshot: SnapshotEntry, devices: set[str]) -> set[str]:
    return {image.key for image in snapshot.images if image.device in devices}


def _unknown_images(context: Context, inventory: messages.Inventory) -> bool:
    """Whether there are images of snapshots that nothing is known of, and that no io process has."""
    there = {report.image for report in inventory.images}
    known = {entry.id for entry in context.catalogue.snapshots()}
    keys = [name.removeprefix(naming.IMAGE_PREFIX) for name in context.state.names() if naming.is_image_state(name)]
    return any(key not in there and key.partition(".")[0] not in known for key in keys)


def _with_map_memory(context: Context, left: list[Left], inventory: messages.Inventory) -> list[Left]:
    states = {
        each.image.key: context.state.path(naming.image_state_name(each.image)) for each in left if each.missing is None
    }
    misfits: set[str] = set()
    why = "map memory that it needs is missing"
    try:
        misfits = portions.adopt(context, inventory.portions, states)
    except (BlksnapError, OSError) as error:
        _raise_if_gone(context, error)
        misfits, why = set(states), f"map memory cannot be had again: {error}"
    return [Left(each.snapshot, each.image, why) if each.image.key in misfits else each for each in left]


def _with_storages(context: Context, left: list[Left], inventory: messages.Inventory) -> list[Left]:
    reports = {report.storage: report for report in inventory.storages}
    missing: dict[str, str] = {}
    for key in sorted({each.snapshot.storage_key for each in left if each.missing is None}):
        try:
            kept_storages.adopt(context, key, reports.get(key))
        except (BlksnapError, OSError) as error:
            _raise_if_gone(context, error)
            missing[key] = f"its difference storage cannot be had again: {error}"
    return [Left(each.snapshot, each.image, each.missing or missing.get(each.snapshot.storage_key)) for each in left]


def _adopted(context: Context, each: Left) -> str | None:
    """None, or why it cannot be."""
    try:
        images.adopt(context, each.snapshot, each.image)
    except (BlksnapError, HistoryError, OSError, KeyError) as error:
        _raise_if_gone(context, error)
        return f"the state of the image of {each.image.origin} cannot be used: {error}"
    return None


def _give_up(context: Context, each: Left, why: str) -> None:
    try:
        losing.lose_with_older(context, each.snapshot, each.image, why)
        # It is not to be tried again: it will lack what is written from now on.
        context.state.remove(naming.image_state_name(each.image))
    except (BlksnapError, OSError) as error:
        _raise_if_gone(context, error)
        _log.error("snapshot %s: %s", each.snapshot.id, error)


def _lose_going(context: Context, snapshots: list[SnapshotEntry]) -> None:
    """Whoever wrote the state of an image began to destroy it, and the catalogue knows nothing of that."""
    going = {report.image for report in context.io.inventory().images if report.status == ImageStatus.GONE.name.lower()}
    for snapshot in snapshots:
        for image in snapshot.images if snapshot.phase is Phase.ACTIVE else ():
            if image.key in going:
                why = f"the state of the image of {image.origin} is not that of an image in use"
                try:
                    losing.lose(context, snapshot.id, why)
                except (BlksnapError, OSError) as error:
                    _raise_if_gone(context, error)
                    _log.error("snapshot %s: %s", snapshot.id, error)


def _finish_later(context: Context, snapshots: list[SnapshotEntry]) -> None:
    """What was not yet, or is no more, a snapshot for its users is removed as soon as that can be."""
    for snapshot in snapshots:
        if snapshot.phase is not Phase.ACTIVE and snapshot.id not in context.unsettled:
            context.unfinished.add(snapshot.id)


def _begin_again(
    context: Context, served: list[DeviceEntry], snapshots: list[SnapshotEntry], inventory: messages.Inventory
) -> None:
    """Before anything of the old state is touched: it may be what the io process dies of."""
    why = "io processes died again and again, and nothing of theirs is used any more"
    there = {report.image for report in inventory.images}
    for snapshot in snapshots:
        for image in snapshot.images:
            if image.key not in there:
                _give_up(context, Left(snapshot, image), why)
    known = {report.device for report in inventory.devices}
    for device in served:
        if device.key not in known:
            histories.try_fresh(context, device, "lifeboat")


def _raise_if_gone(context: Context, error: Exception) -> None:
    if context.io.lost():
        raise Failed("the io process has died again", errno="EPIPE") from error
