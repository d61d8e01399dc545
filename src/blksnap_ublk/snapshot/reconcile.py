# SPDX-License-Identifier: MIT
"""Making the catalogue, the io process and the kernel agree: at the start, and when the io process was replaced.

A device that is served is never disturbed. What was half done is finished or undone. Where the io process has died,
the one that is there now gets all that it left, and devices and images are served again; see `recovery`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec

from blksnap_ublk.cbt import HistoryError
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import adopting, destroy, detach, leftovers, map_memory, naming, resize
from blksnap_ublk.snapshot.catalogue import DeviceEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.recovery import adoption, devices, histories, images, losing, sweeping
from blksnap_ublk.ublk.device_info import DeviceState as KernelState

_SWEEP_FIRST = 0.25  # seconds for a check that makes room for new maps, before room is added and devices are served
_SWEEP_LIMIT = 1.0  # seconds for a check before images wait for the thread that looks after them
_AGAIN = 0.1  # seconds between two attempts where the io process dies during the first
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def reconcile(context: Context) -> None:
    """Connects to the io process and puts everything right that can be; failures are logged. Raises Failed without one.

    Waits for operations under way on any device, and lets none begin on those that it knows. Where it fails as a whole
    nobody reaches the io process, which lacks what was left, until it is called again.
    """
    while True:
        try:
            _reconcile(context)
        except Exception as error:
            if not isinstance(error, BlksnapError | OSError) or not context.io.pid or not context.io.lost():
                context.io.close()
                raise
            _log.error("the io process has died during recovery: %s", error)
        if not context.io.lost():
            return
        time.sleep(_AGAIN)


def go_on(context: Context) -> bool:
    """What could not be done at once; never waits for long. Whether more of it is to come soon.

    Raises BlksnapError when the io process has gone.
    """
    devices.try_again(context)
    sweeping.look(context)
    if context.sweeping:
        return context.untold is None
    images.serve_waiting(context)
    return bool(context.waiting - context.refused.keys()) and not context.conditions


def clear_away(context: Context) -> None:
    """What is left of snapshots that were lost, or whose taking or removal was broken off. May wait."""
    if context.sweeping:
        return
    for snapshot in reversed(context.catalogue.snapshots()):  # one that was going goes before anything older
        lost = snapshot.lost is not None and any(each.served for each in snapshot.images)
        if not lost and snapshot.id not in context.unsettled | context.unfinished:
            continue
        with context.locks.trying(destroy.devices_of(context, snapshot)) as held:
            entry = context.catalogue.snapshot(snapshot.id) if held else None
            if entry is not None:
                with suppress(BlksnapError, HistoryError, OSError):
                    _clear_away(context, entry, limit=destroy.TRY_LIMIT)
    for key in list(context.unheld):
        if not context.conditions:
            with suppress(BlksnapError, OSError):
                adopting.adopt(context, key, on_filtered=True)


def keep_again(context: Context) -> None:
    """The keeper is another one: gives it what this process holds. Raises OSError."""
    context.keeper.reconnect()
    for storage in context.catalogue.storages():
        if storage.released:
            continue  # its lock may be held for long
        with context.storage_locks.holding([storage.key]):
            current = context.catalogue.storage(storage.key)
            if current is not None and current.key in context.open_storages:
                adopting.put_again(context, current.areas)


def _reconcile(context: Context) -> None:
    keys = {entry.key for entry in context.catalogue.devices()}
    with context.locks.holding(keys):
        with map_memory.halted():
            inventory = context.io.connect()
            context.refused.clear()
            keys |= _guarded("rebuilding the catalogue", leftovers.rebuild_devices, context, inventory, keys) or set()
            known = [entry for entry in context.catalogue.devices() if entry.key in keys]
            snapshots = _of(context, keys)
            histories.open_all(context, known)
            histories.settle_all(context, snapshots, {report.device for report in inventory.devices})
            known = resize.settle_all(context, known, {report.device for report in inventory.devices})
            known = [_guarded(device.origin, _kept, context, device, inventory) or device for device in known]
            active = [device for device in known if device.phase is Phase.ACTIVE]
            adoption.adopt(context, active, snapshots, inventory)
            sweeping.begin(context, snapshots)
        snapshots = _of(context, keys)
        if naming.held_snapshots(context.catalogue):
            sweeping.wait(context, _SWEEP_FIRST)
            _guarded("map memory", map_memory.ensure, context)
        devices.serve_all(context, active)
        for device in active:
            if device.key not in context.conditions:
                _guarded(device.origin, resize.tell_kernel, context, device)
        context.io_died = None
        for snapshot in snapshots:
            if snapshot.id not in context.unsettled and snapshot.phase is Phase.ACTIVE and snapshot.lost is None:
                _guarded(f"snapshot {snapshot.id}", _restore_snapshot, context, snapshot)
        sweeping.wait(context, _SWEEP_LIMIT)
        if not context.sweeping:
            for snapshot in snapshots:
                if snapshot.id in context.waiting:
                    _guarded(f"snapshot {snapshot.id}", images.serve, context, snapshot.id)
            for snapshot in reversed(_of(context, keys)):
                _guarded(f"snapshot {snapshot.id}", _clear_away, context, snapshot)
        for device in known:
            if device.phase is not Phase.ACTIVE:
                going = detach.resume if device.phase is Phase.DESTROYING else detach.take_apart
                _guarded(device.origin, going, context, device)
        if not context.io.lost():
            _guarded("removing what is left over", leftovers.remove_unknown, context, keys)
        _guarded("making links again", context.disks.sweep_links, context.catalogue)


def _of(context: Context, keys: set[str]) -> list[SnapshotEntry]:
    """The snapshots of devices of these keys, and of none that is known besides."""
    others = {entry.key for entry in context.catalogue.devices()} - keys
    return [entry for entry in context.catalogue.snapshots() if not destroy.devices_of(context, entry) & others]


def _kept(context: Context, device: DeviceEntry, inventory: messages.Inventory) -> DeviceEntry:
    """A device that was about to go when its io process died is served again: what is cached of it must not be lost."""
    known = any(report.device == device.key for report in inventory.devices)
    if known or device.phase is not Phase.DESTROYING or device.served is None:
        return device
    if context.disks.state_of(device.served) in (None, KernelState.DEAD):
        return device
    device = msgspec.structs.replace(device, phase=Phase.ACTIVE)
    context.catalogue.put_device(device)
    return device


def _restore_snapshot(context: Context, snapshot: SnapshotEntry) -> None:
    """One that lives: its storage is held by this process too, and its images are served as soon as they can be."""
    context.state.remove(naming.commit_name(snapshot.id))
    context.waiting.add(snapshot.id)
    if images.all_served(context, snapshot, context.io.inventory()):
        context.stop_waiting(snapshot.id)
    adopting.adopt(context, snapshot.storage_key)  # where it fails the io process has it: it only cannot grow yet


def _clear_away(context: Context, snapshot: SnapshotEntry, limit: float = destroy.TRY_LIMIT) -> None:
    """For a caller that holds the locks of its devices. Raises BlksnapError, OSError, HistoryError."""
    if snapshot.id in context.unsettled:
        histories.settle_all(context, [snapshot], {report.device for report in context.io.inventory().devices})
        if snapshot.id in context.unsettled:
            return
    if snapshot.lost is None and snapshot.phase is Phase.ACTIVE:
        return
    if losing.end_disks(context, snapshot) and snapshot.phase is not Phase.ACTIVE:
        entry = context.catalogue.snapshot(snapshot.id)
        if entry is not None:
            destroy.destroy_locked(context, entry, force=True, limit=limit)


def _guarded(subject: str, function: Callable[..., Result], *arguments: object) -> Result | None:
    """One thing that cannot be put right must not keep the others from being so."""
    try:
        return function(*arguments)
    except (BlksnapError, HistoryError, OSError) as error:
        _log.error("%s: %s", subject, error)
    except Exception:
        _log.exception("%s: unexpected error; going on", subject)
    return None
