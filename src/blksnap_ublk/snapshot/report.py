# SPDX-License-Identifier: MIT
"""The forms that users see, from the catalogue and the state files. Never waits for a lock or another process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

from blksnap_ublk import forms
from blksnap_ublk.forms import DataPath, DeviceState, SnapshotState
from blksnap_ublk.snapshot import naming, overflow, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, DeviceEntry, ImageEntry, Phase, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.naming import cursor, image_state_name
from blksnap_ublk.snapshot.role import Role
from blksnap_ublk.snapshot.state_files import ImageState, ImageStatus

Forecast = Callable[[str, int, int], float | None]
"""From the key of a storage, bytes used and capacity to the seconds until it is full."""


def device_form(context: Context, entry: DeviceEntry) -> forms.Device:
    """A filtered device."""
    assert entry.served is not None
    history = context.histories.get(entry.key)
    return forms.Device(
        device=naming.block_path(entry),
        name=entry.name,
        origin=entry.origin,
        id=entry.served.ublk_id,
        size=entry.size,
        state=context.conditions.get(entry.key, DeviceState.LIVE),
        data_path=DataPath.ZERO_COPY if entry.served.zero_copy else DataPath.COPY,
        queues=entry.served.queues,
        depth=entry.served.depth,
        generation=str(history.generation) if history else "",
        change_number=history.number if history else 0,
        tracking_block=entry.tracking_block,
        unit=entry.unit,
        snapshots=[snapshot.id for snapshot in naming.snapshots_of(context.catalogue, entry.key)],
        link=_link(Role.of_filtered(entry.name, entry.origin)),
    )


def snapshot_form(context: Context, entry: SnapshotEntry, forecast: Forecast = lambda *_: None) -> forms.Snapshot:
    """A snapshot: as broken as the worst of its images."""
    states = [_image_state(context, entry, image) for image in entry.images]
    state, error = condition(context, entry)
    return forms.Snapshot(
        id=entry.id,
        created=entry.created,
        state=state,
        error=error,
        lost_at=None if entry.broken_at is None else forms.timestamp(entry.broken_at),
        frozen=entry.frozen,
        gate_us=entry.gate_us,
        gate_writes_us=entry.gate_writes_us,
        images=[_image_form(context, entry, image, found) for image, found in zip(entry.images, states, strict=True)],
        storage=storage_form(context, storages.of(context, entry), forecast),
        expires=None if entry.expires is None else forms.timestamp(entry.expires),
        ttl=entry.ttl,
        while_pid=entry.while_pid,
        partitions=entry.partitions,
    )


def condition(context: Context, entry: SnapshotEntry) -> tuple[SnapshotState, str | None]:
    """Whether a snapshot can be trusted, and if not, why."""
    if entry.lost is not None:
        return SnapshotState.CORRUPTED, entry.lost
    if entry.phase is Phase.DESTROYING:
        return SnapshotState.CORRUPTED, "it is being destroyed"
    if entry.phase is Phase.CREATING:
        return SnapshotState.ACTIVE, None
    for image in entry.images:
        found = context.state.image_state(image_state_name(image))
        status = ImageStatus.CORRUPTED if found is None else found.status
        if status is not ImageStatus.ACTIVE:
            return _STATES[status], entry.broken_why or _reason(context, entry, image, found)
    return SnapshotState.ACTIVE, None


_STATES = {
    ImageStatus.NEW: SnapshotState.CORRUPTED,
    ImageStatus.ACTIVE: SnapshotState.ACTIVE,
    ImageStatus.OVERFLOWN: SnapshotState.OVERFLOWN,
    ImageStatus.CORRUPTED: SnapshotState.CORRUPTED,
    ImageStatus.GONE: SnapshotState.CORRUPTED,
}


_STORAGE_AT_FAULT = {
    errno.EBADMSG: "difference storage returned other data than was written to it; check the device it is on",
    errno.ESTALE: "difference storage was truncated, punched or moved by somebody else; `events` names the file",
    errno.ENODEV: "a device that holds difference storage is gone; `events` names it",
}


def _image_state(context: Context, entry: SnapshotEntry, image: ImageEntry) -> ImageState:
    found = context.state.image_state(image_state_name(image))
    if entry.phase is Phase.CREATING:
        return ImageState(ImageStatus.ACTIVE, 0, 0)
    if found is None or entry.lost is not None:
        return ImageState(ImageStatus.CORRUPTED, errno.EIO, found.preserved if found else 0)
    return found


def _reason(context: Context, entry: SnapshotEntry, image: ImageEntry, found: ImageState | None) -> str:
    if found is None:
        return f"the state of the image of {image.origin} cannot be read"
    if found.status is ImageStatus.OVERFLOWN:
        storage = storages.of(context, entry)
        _, capacity = storages.used_bytes(context, storage)
        return overflow.explain(storage.on_overflow, capacity, storage.limit)
    if found.error in _STORAGE_AT_FAULT:
        return f"{_STORAGE_AT_FAULT[found.error]} ({errno.errorcode[found.error]})"
    if found.error == errno.ENOMEM:
        return "map memory is used up (ENOMEM)"
    if found.error in (errno.ETIMEDOUT, errno.ETIME):
        return f"preserving old data of {image.origin} took too long (ETIMEDOUT)"
    symbol = errno.errorcode.get(found.error, str(found.error))
    return f"preserving old data of {image.origin} failed: {os.strerror(found.error)} ({symbol})"


def _image_form(context: Context, entry: SnapshotEntry, image: ImageEntry, state: ImageState) -> forms.Image:
    device = context.catalogue.device(image.device)
    node = f"/dev/ublkb{image.served.ublk_id}" if image.served is not None else ""
    return forms.Image(
        image=node,
        device=image.filtered,
        origin=image.origin,
        size=image.size,
        generation=image.generation,
        change_number=image.change_number,
        cursor=cursor(image),
        state=_STATES[state.status],
        preserved_bytes=state.preserved,
        link=None if device is None else _link(Role.of_image(entry.id, device.name, image.origin)),
    )


def storage_form(context: Context, storage: StorageEntry, forecast: Forecast = lambda *_: None) -> forms.Storage:
    """A difference storage. A file grows in portions: areas that follow one another in it are shown as one."""
    used, capacity = storages.used_bytes(context, storage)
    state = context.state.storage_state(naming.storage_state_name(storage.key))
    return forms.Storage(
        used=sum(used),
        capacity=capacity,
        limit=storage.limit,
        on_overflow=storage.on_overflow,
        areas=_areas(storage.areas, used),
        forecast_seconds=forecast(storage.key, sum(used), context.reach.get(storage.key, capacity)),
        snapshots=[each.id for each in naming.held_snapshots(context.catalogue) if each.storage_key == storage.key],
        wipe=storage.wipe,
        copy_rate=storage.copy_rate,
        waiting=0 if state is None else state.waiting,
        growing=storages.grows(storage),
    )


def _areas(areas: Sequence[AreaEntry], used: Sequence[int]) -> list[forms.Area]:
    """`used`: bytes of each."""
    found: list[forms.Area] = []
    ends: dict[tuple[str, tuple[int, int], int], int] = {}
    for area, bytes_used in zip(areas, used, strict=True):
        if not area.length:
            continue
        file = (area.path, area.filesystem, area.inode)
        shown = forms.Area(path=area.path, start=area.offset // 512, count=area.length // 512, used=bytes_used)
        last = ends.get(file)
        if last is not None and found[last].start + found[last].count == shown.start:
            former = found[last]
            found[last] = forms.Area(
                path=former.path,
                start=former.start,
                count=former.count + shown.count,
                used=former.used + shown.used,
            )
            continue
        ends[file] = len(found)
        found.append(shown)
    return found


def _link(role: Role) -> str | None:
    path = f"/dev/{role.link}"
    return path if os.path.islink(path) else None
