# SPDX-License-Identifier: MIT
"""Making the catalogue, the io process and the kernel agree: at the start, and when the io process was replaced.

A device that is served is never disturbed. What was half done is finished or undone. A device whose io process has died
is served again, by the io process that is there now, with the same change map; snapshots do not survive that.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from blksnap_ublk.cbt import History, HistoryDamaged, HistoryError
from blksnap_ublk.errors import BlksnapError, Failed, from_os_error
from blksnap_ublk.forms import DeviceState
from blksnap_ublk.host import claim
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import (
    adopting,
    attach,
    destroy,
    detach,
    leftovers,
    naming,
    releasing,
    same_device,
    storages,
    taking,
)
from blksnap_ublk.snapshot.catalogue import DeviceEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.ublk.device_info import DeviceState as KernelState

_PATIENCE = 5.0  # seconds for the last I/O of a dead io process, before the device is tried again from time to time
_AT_ONCE = 16  # devices that are recovered at the same time
_DIED = "the io process that preserved its data has died"
_log = logging.getLogger(__name__)


def reconcile(context: Context) -> None:
    """Connects to the io process and puts everything right that can be; failures are logged. Raises Failed without one.

    Waits for operations under way on any device, and lets none begin on those that it knows.
    """
    keys = {entry.key for entry in context.catalogue.devices()}
    with context.locks.holding(keys):
        inventory = context.io.connect()
        _guarded("rebuilding the catalogue", leftovers.rebuild_devices, context, inventory, keys)
        keys |= {entry.key for entry in context.catalogue.devices()} & {report.device for report in inventory.devices}
        devices = [entry for entry in context.catalogue.devices() if entry.key in keys]
        snapshots = [entry for entry in context.catalogue.snapshots() if destroy.devices_of(context, entry) <= keys]
        for device in devices:
            _guarded(device.origin, _open_history, context, device)
        for snapshot in snapshots:
            if snapshot.phase is Phase.CREATING:
                context.unsettled.add(snapshot.id)
                _guarded(f"snapshot {snapshot.id}", _settle, context, snapshot)
        devices = [_kept(context, device, inventory) for device in devices]
        _restore_devices(context, [device for device in devices if device.phase is Phase.ACTIVE], inventory)
        for snapshot in snapshots:
            if snapshot.id not in context.unsettled:
                _guarded(f"snapshot {snapshot.id}", _restore_snapshot, context, snapshot, inventory)
        for device in devices:
            if device.phase is not Phase.ACTIVE:
                going = detach.resume if device.phase is Phase.DESTROYING else detach.take_apart
                _guarded(device.origin, going, context, device)
        _guarded("removing what is left over", leftovers.remove_unknown, context, keys)
        _guarded("making links again", context.disks.sweep_links, context.catalogue)


def try_again(context: Context) -> None:
    """Once more for devices that could not be served again, for instance because their origin did not answer.

    The same for what is left of snapshots that were lost, or whose taking failed half way.
    """
    for key in list(context.conditions):
        with context.locks.holding([key]):
            device = context.catalogue.device(key)
            if device is not None and device.phase is Phase.ACTIVE and key in context.conditions:
                _restore_device(context, device, context.io.inventory(), patience=0)
    for snapshot in context.catalogue.snapshots():
        if snapshot.lost is None or (
            snapshot.phase is Phase.ACTIVE and not any(each.served for each in snapshot.images)
        ):
            continue
        with context.locks.holding(destroy.devices_of(context, snapshot)), suppress(BlksnapError):
            entry = context.catalogue.snapshot(snapshot.id)
            if entry is not None and _end_images(context, entry) and entry.phase is not Phase.ACTIVE:
                destroy.destroy_locked(context, entry, force=True)
    for snapshot in context.catalogue.snapshots():
        if snapshot.id not in context.unsettled:
            continue
        devices = destroy.devices_of(context, snapshot)
        with context.locks.holding(devices), suppress(BlksnapError, HistoryError, OSError):
            if snapshot.id in context.unsettled:  # not destroyed meanwhile
                _settle(context, snapshot)
                _restore_snapshot(context, snapshot, context.io.inventory())


def _settle(context: Context, snapshot: SnapshotEntry) -> None:
    """Raises OSError, HistoryError; then nothing else may be done with it, and it is tried again."""
    taking.settle(context, snapshot)
    context.unsettled.discard(snapshot.id)


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


def _open_history(context: Context, device: DeviceEntry) -> None:
    if device.key in context.histories:
        return
    directory = context.state.path(f"device-{device.key}")
    try:
        history = History.open(directory)
    except (HistoryDamaged, FileNotFoundError) as error:
        if device.phase is not Phase.ACTIVE:
            return
        _log.error("%s: the change history is damaged (%s): everything counts as changed", device.origin, error)
        directory.mkdir(mode=0o700, exist_ok=True)
        last = max(
            (
                image.change_number
                for snapshot in naming.snapshots_of(context.catalogue, device.key)
                for image in snapshot.images
            ),
            default=0,
        )
        history = History.create(directory, device.size, device.tracking_block, number=last, reason="damaged")
    context.histories[device.key] = history


def _restore_devices(context: Context, devices: list[DeviceEntry], inventory: messages.Inventory) -> None:
    """All at once: one whose origin does not answer does not keep the others waiting."""
    if devices:
        with ThreadPoolExecutor(min(len(devices), _AT_ONCE), thread_name_prefix="recovery") as threads:
            list(threads.map(lambda device: _restore_device(context, device, inventory), devices))


def _restore_device(
    context: Context, device: DeviceEntry, inventory: messages.Inventory, patience: float = _PATIENCE
) -> None:
    """Leaves a device that is served alone; otherwise lets the io process of now serve it.

    The last I/O of a dead one is waited for `patience` seconds.
    """
    report = next((report for report in inventory.devices if report.device == device.key), None)
    if report is not None and report.serving:
        context.conditions.pop(device.key, None)
        return
    path = naming.block_path(device)
    before = context.conditions.get(device.key)
    if before is None:
        context.conditions[device.key] = DeviceState.RECOVERING
        _log.warning("%s: its io process is gone; recovering", path)
    try:
        _recover(context, device, known=report is not None, patience=patience)
    except TimeoutError as error:
        if patience:
            _log.warning("%s: waits, and is tried again: %s", path, error)
        return
    except (BlksnapError, OSError, HistoryError) as error:
        context.conditions[device.key] = DeviceState.FAILED
        if before is not DeviceState.FAILED:
            _log.error("%s: cannot be served again, will be tried from time to time: %s", path, error)
            context.emit("failed", device=path, error=str(error))
        return
    context.conditions.pop(device.key, None)
    context.emit("recovered", device=path)


def _recover(context: Context, device: DeviceEntry, *, known: bool, patience: float) -> None:
    served = device.served
    assert served is not None
    if context.disks.state_of(served) in (None, KernelState.DEAD):
        raise Failed("its disk was removed by somebody else", advice="detach it")
    if known:
        context.io.end(messages.CloseDevice(device.key))
    origin = _claimed_origin(context, device)
    try:
        attach.open_at_io(context, device, origin)
    finally:
        os.close(origin)
    try:
        # Its file system may have got blocks back that were storage; what is written to them now must come last.
        if same_device.storages_beneath(context, device.key) and not releasing.late_writes_end(context, patience):
            raise TimeoutError(errno.ETIMEDOUT, "writes to storage beneath it have not ended")
        context.disks.begin_recovery(served.ublk_id, patience)
        context.io.call(attach.serve_message(device.key, served))
        context.disks.end_recovery(served.ublk_id, context.io.pid)
    except BaseException:
        with suppress(BlksnapError):
            context.io.end(messages.CloseDevice(device.key))
        raise


def _claimed_origin(context: Context, device: DeviceEntry) -> int:
    name = f"origin:{device.key}"
    try:
        return context.keeper.get(name)
    except OSError:
        pass  # the keeper is another one: the claim ended with the former
    descriptor = claim.open_exclusive(device.origin)
    try:
        status = os.fstat(descriptor)
        if (os.major(status.st_rdev), os.minor(status.st_rdev)) != device.number:
            text = f"is another device now, not {device.number[0]}:{device.number[1]}"
            raise from_os_error(OSError(6, text), subject=device.origin)
        context.keeper.put(name, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _restore_snapshot(context: Context, snapshot: SnapshotEntry, inventory: messages.Inventory) -> None:
    """Keeps a snapshot that lives in the io process; otherwise it is corrupted, and its images end."""
    died = not any(report.storage == snapshot.storage_key for report in inventory.storages)
    if snapshot.phase is not Phase.ACTIVE:
        if died and snapshot.lost is None:
            # Should the rest of its removal have to wait, it can be seen, and removed by its users.
            snapshot = msgspec.structs.replace(snapshot, phase=Phase.DESTROYING, lost=_DIED)
            context.catalogue.put_snapshot(snapshot)
        if not died or _end_images(context, snapshot):
            destroy.try_destroy(context, snapshot)
        return
    known = {report.image for report in inventory.images if report.taken and report.serving}
    if all(image.key in known for image in snapshot.images):
        adopting.adopt(context, storages.of(context, snapshot))
        context.state.remove(naming.commit_name(snapshot.id))
        return
    if snapshot.lost is None:
        snapshot = msgspec.structs.replace(snapshot, lost=_DIED, broken_at=time.time(), broken_why=_DIED)
        context.catalogue.put_snapshot(snapshot)
        context.emit("corrupted", snapshot=snapshot.id, device=naming.only_device(snapshot), error=snapshot.lost)
    _end_images(context, snapshot)


def _end_images(context: Context, snapshot: SnapshotEntry) -> bool:
    """Removes the disks of a lost snapshot's images; False, and nothing is done, while their last I/O is under way."""
    served = [image.served for image in snapshot.images if image.served is not None]
    states = {each.ublk_id: context.disks.state_of(each) for each in served}
    try:
        for ublk_id, state in states.items():
            if state not in (None, KernelState.DEAD):
                context.disks.begin_recovery(ublk_id, 0)
    except TimeoutError:
        return False
    for ublk_id, state in states.items():
        if state is not None:
            context.disks.stop(ublk_id)
    for image in snapshot.images:
        context.io.end(messages.FinishImage(image.key))
        if image.served is not None and states[image.served.ublk_id] is not None:
            context.disks.delete(image.served.ublk_id, in_use=True)
    # Their ids are free for other devices.
    images = [msgspec.structs.replace(image, served=None) for image in snapshot.images]
    context.catalogue.put_snapshot(msgspec.structs.replace(snapshot, images=images))
    return True


def _guarded(subject: str, function: object, *arguments: object) -> None:
    """One thing that cannot be put right must not keep the others from being so."""
    assert callable(function)
    try:
        function(*arguments)
    except (BlksnapError, HistoryError, OSError) as error:
        _log.error("%s: %s", subject, error)
