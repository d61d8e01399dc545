# SPDX-License-Identifier: MIT
"""Detach: the filtered device goes, its origin is as it was, with everything that was written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from blksnap_ublk.errors import BlksnapError, Busy, NotFound, from_os_error
from blksnap_ublk.host import pagecache
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import buffers, destroy, disks, naming, same_device, saved_changes
from blksnap_ublk.snapshot.catalogue import DeviceEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.ublk.device_info import DeviceState

_LATE_WRITES_LIMIT = 2.0  # seconds for the origin to end what a dead io process has sent it
_log = logging.getLogger(__name__)


def detach(context: Context, device: DeviceEntry, *, force: bool) -> tuple[list[str], list[str]]:
    """Writes back and stops; the ids of the snapshots that `force` destroyed, and warnings.

    Raises Busy naming who holds it, unless `force`, and when requests of a dead io process are under way; Failed when
    what is cached cannot be written to the origin; then the device goes on.
    """
    with _holding_with_snapshots(context, device.key) as (held, stored):
        entry = context.catalogue.device(device.key)
        if entry is None or entry.served is None:
            raise NotFound("has been detached meanwhile", subject=device.origin)
        path = naming.block_path(entry)
        if held and not force:
            named = ", ".join(snapshot.id for snapshot in held)
            advice = f"destroy {'it' if len(held) == 1 else 'them'} first, or use --force"
            raise Busy(f"in use by snapshot {named}", subject=path, errno="EBUSY", advice=advice)
        if stored and not force:
            named = ", ".join(snapshot.id for snapshot in stored)
            advice = f"destroy {'it' if len(stored) == 1 else 'them'} first, or use --force"
            raise Busy(f"holds the difference storage of snapshot {named}", subject=path, errno="EBUSY", advice=advice)
        _refuse_late_writes(context, entry)
        users = disks.users(entry.served.ublk_id) if context.disks.state_of(entry.served) is not None else []
        if users and not force:
            disks.refuse_used(entry.served.ublk_id)
        warnings = [f"{path}: {user} gets errors from now on" for user in users]
        with _going(context, entry):
            for snapshot in sorted((*reversed(held), *stored), key=lambda each: each.phase is not Phase.DESTROYING):
                warnings += destroy.destroy_locked(context, snapshot, force=True)
                whose = "its snapshot" if snapshot in held else "the difference storage on it, with its snapshot"
                warnings.append(f"{path}: {whose} {snapshot.id} was destroyed{_with_others(snapshot, entry)}")
        _write_back_and_stop(context, entry, force=force)
        warnings += take_apart(context, entry, in_use=force)
    context.emit("detached", device=path, origin=entry.origin, name=entry.name)
    return [snapshot.id for snapshot in (*held, *stored)], warnings


@contextmanager
def _holding_with_snapshots(context: Context, key: str) -> Iterator[tuple[list[SnapshotEntry], list[SnapshotEntry]]]:
    """Holds the locks of a device and of all that share a snapshot, or storage beneath them, with it.

    Gives the snapshots of the device, and those of others whose storage lies beneath it, oldest first.
    """
    while True:
        keys = {key}.union(*(destroy.devices_of(context, each) for each in _involved(context, key)))
        with context.locks.holding(keys):
            involved = _involved(context, key)
            if all(destroy.devices_of(context, each) <= keys for each in involved):
                held = naming.snapshots_of(context.catalogue, key)
                yield held, [each for each in involved if each not in held]
                return


def _involved(context: Context, key: str) -> list[SnapshotEntry]:
    found = [*naming.snapshots_of(context.catalogue, key), *same_device.snapshots_on(context, key)]
    return list({entry.id: entry for entry in found}.values())


@contextmanager
def _going(context: Context, entry: DeviceEntry) -> Iterator[None]:
    """A device that is not served cannot count as changed what its storage leaves behind; once it goes it need not."""
    if entry.key in context.conditions:
        context.catalogue.put_device(msgspec.structs.replace(entry, phase=Phase.DESTROYING))
    try:
        yield
    except BaseException:
        context.catalogue.put_device(entry)
        raise


def _with_others(snapshot: SnapshotEntry, entry: DeviceEntry) -> str:
    others = [image.filtered for image in snapshot.images if image.device != entry.key]
    return f", also of {', '.join(others)}" if others else ""


def _refuse_late_writes(context: Context, entry: DeviceEntry) -> None:
    """For a device whose io process has died: its last write must have ended before others get the origin.

    Raises Busy, after a moment.
    """
    assert entry.served is not None
    waits = entry.key in context.conditions
    if not waits or context.disks.state_of(entry.served) in (None, DeviceState.DEAD):
        return
    try:
        context.disks.begin_recovery(entry.served.ublk_id, _LATE_WRITES_LIMIT)
    except TimeoutError:
        text = "the origin does not answer: requests of the io process that died are still under way"
        advice = "try again when they have ended"
        raise Busy(text, subject=naming.block_path(entry), errno="EBUSY", advice=advice) from None
    except OSError as error:
        raise from_os_error(error, subject=naming.block_path(entry)) from None


def resume(context: Context, entry: DeviceEntry) -> None:
    """Goes on with a detach that was broken off, unless somebody has begun to use the device. Raises BlksnapError."""
    assert entry.served is not None
    _write_back_and_stop(context, entry, force=False)
    take_apart(context, entry)


def take_apart(context: Context, entry: DeviceEntry, *, in_use: bool = True) -> list[str]:
    """Removes a device whose disk is gone, or of which only a part was ever made; repeatable. Returns warnings.

    `in_use`: somebody may still have the disk open, and is not waited for. Raises BlksnapError when it is held else.
    """
    warnings: list[str] = []
    try:
        if entry.served is not None and context.disks.state_of(entry.served) is not None:
            context.disks.stop(entry.served.ublk_id)
        context.io.end(messages.CloseDevice(entry.key))
        if entry.served is not None and context.disks.state_of(entry.served) is not None:
            context.disks.delete(entry.served.ublk_id, in_use=in_use)
    except OSError as error:
        raise from_os_error(error, subject=entry.origin) from None
    try:
        # What the kernel cached of the origin and its partitions before the attach is older than what is on it now.
        pagecache.flush_disk(DeviceNumber(*entry.number))
    except BlksnapError as error:
        warnings.append(f"cached pages of the origin may be stale: {error}")
    warnings += saved_changes.save(context, entry)
    with suppress(OSError):
        context.keeper.drop(naming.origin_descriptor_name(entry.key))
    try:
        context.disks.links.origin_released(DeviceNumber(*entry.number))
    except OSError as error:
        warnings.append(f"{entry.origin}: its links may not have returned: {error}")
    history = context.histories.pop(entry.key, None)
    if history is not None:
        history.remove()
    context.state.remove(f"device-{entry.key}")
    with suppress(BlksnapError):
        buffers.remove_unused(context)
    context.conditions.pop(entry.key, None)
    context.catalogue.remove_device(entry.key)
    return warnings


def _write_back_and_stop(context: Context, entry: DeviceEntry, *, force: bool) -> None:
    """The entry says that it goes before it does, and no longer when it stays."""
    assert entry.served is not None
    if context.disks.state_of(entry.served) is None:
        _log.warning("%s: its ublk device is gone already", entry.origin)
        return
    context.catalogue.put_device(msgspec.structs.replace(entry, phase=Phase.DESTROYING))
    try:
        disks.write_back_and_stop(entry.served.ublk_id, force=force, given_up=context.io.lost)
    except BlksnapError:
        context.catalogue.put_device(msgspec.structs.replace(entry, phase=Phase.ACTIVE))
        raise
