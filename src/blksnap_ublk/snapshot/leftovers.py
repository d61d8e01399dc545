# SPDX-License-Identifier: MIT
"""What no entry of the catalogue explains: rebuilt where a device is served, removed otherwise."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from contextlib import suppress

from blksnap_ublk.cbt import History, HistoryDamaged
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.host import blockdev
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import attach, buffers, map_memory, naming, releasing
from blksnap_ublk.snapshot.catalogue import DeviceEntry, Phase, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.ublk.device_info import DeviceState

_OF_SNAPSHOT = re.compile(r"(?:image|commit)-(?P<id>[0-9a-f-]{36})(?:\.[0-9]+)?")
_OF_STORAGE = re.compile(r"(?:storage|records)-(?P<key>[0-9a-f-]{36})(?:\.[0-9]+)?")
_OF_DEVICE = re.compile(r"device-(?P<key>[0-9a-f]{8})")
_KEY = re.compile(r"[0-9a-f]{8}")
_log = logging.getLogger(__name__)


def rebuild_devices(context: Context, inventory: messages.Inventory, known: Collection[str]) -> set[str]:
    """Makes an entry for each device that the catalogue lost, as far as can be known; the keys of those.

    They are those that the io process serves, and those that wait for a server and whose origin the keeper holds. The
    name of each becomes that of its origin. Each is told in the log.
    """
    found = {
        report.device: report.ublk_id for report in inventory.devices if report.serving and report.ublk_id is not None
    }
    prefix = naming.origin_descriptor_name("")
    held = (name.removeprefix(prefix) for name in _held_names(context) if name.startswith(prefix))
    found |= context.disks.filtered(key for key in held if _KEY.fullmatch(key) and key not in known)
    rebuilt = set()
    for key, ublk_id in found.items():
        # One may have been attached since `known` was looked up.
        if key in known or context.catalogue.device(key) is not None:
            continue
        try:
            entry = _rebuilt(context, key, ublk_id)
        except (OSError, BlksnapError) as error:
            _log.error("/dev/ublkb%d is ours, but nothing more is known of it: %s", ublk_id, error)
            continue
        context.catalogue.put_device(entry)
        rebuilt.add(key)
        _log.error("/dev/ublkb%d: its entry was lost; rebuilt from what is known of it", ublk_id)
    return rebuilt


def remove_unknown(context: Context, keys: Collection[str]) -> None:
    """Removes images, storages, ublk devices, descriptors and files that belong to nothing; failures are logged.

    `keys`: the devices whose locks are held; operations on others may be under way and are left alone.
    """
    # What exists is looked up before what is known: what an attach makes meanwhile is known by then.
    files = context.state.names()
    inventory = context.io.inventory()
    names = _held_names(context)
    known_storages = context.catalogue.storages()
    snapshots = {entry.id for entry in context.catalogue.snapshots()}
    _remove_images(context, inventory, snapshots, keys)
    _release_storages(context, known_storages)
    storage_keys = _storage_keys(context)
    for storage in inventory.storages:
        if storage.storage not in storage_keys:
            _tried(f"storage {storage.storage}", context, messages.CloseStorage(storage.storage))
    devices = {entry.key for entry in context.catalogue.devices()}
    for device in inventory.devices:
        if device.device not in devices and not device.serving:
            _tried(f"device {device.device}", context, messages.CloseDevice(device.device))
    _remove_unstarted(context, keys)
    _release_numbers(context, keys)
    devices |= {report.device for report in inventory.devices}
    _remove_descriptors(context, names, storage_keys, devices)
    _remove_files(context, files, snapshots | storage_keys, devices)
    buffers.remove_unused(context)
    map_memory.remove_unused(context)


def _rebuilt(context: Context, key: str, ublk_id: int) -> DeviceEntry:
    origin = context.keeper.get(naming.origin_descriptor_name(key))
    try:
        number = DeviceNumber.of(os.fstat(origin).st_rdev)
    finally:
        os.close(origin)
    block = blockdev.describe_number(number)
    served = context.disks.served_as(ublk_id)
    size, tracking_block = block.size, max(attach.DEFAULT_TRACKING_BLOCK, block.limits.logical_block)
    with suppress(HistoryDamaged, OSError):
        history = History.open(context.state.path(f"device-{key}"))
        size, tracking_block = history.size, history.tracking_block
    taken = {entry.name for entry in context.catalogue.devices()}
    name = os.path.basename(block.path)
    return DeviceEntry(
        key=key,
        name=name if name not in taken else f"{name}-{key}",
        origin=block.path,
        number=(number.major, number.minor),
        size=size,
        block=block.limits.logical_block,
        unit=max(4096, block.limits.logical_block),
        tracking_block=tracking_block,
        phase=Phase.ACTIVE,
        served=served,
    )


def _remove_images(
    context: Context, inventory: messages.Inventory, snapshots: Collection[str], keys: Collection[str]
) -> None:
    for image in inventory.images:
        if image.image.partition(".")[0] in snapshots:
            continue
        _log.error("image %s belongs to no snapshot that is known: removed", image.image)
        try:
            if image.ublk_id is not None:
                context.disks.stop(image.ublk_id)
                context.io.end(messages.FinishImage(image.image))
                context.disks.delete(image.ublk_id, in_use=True)
            context.io.end(messages.Drop(image.image))
        except (OSError, BlksnapError) as error:
            _log.error("image %s: %s", image.image, error)


def _release_storages(context: Context, found: Collection[StorageEntry]) -> None:
    """Storages that no snapshot uses, for instance because its entry was damaged: their files are cut back."""
    for storage in found:
        # What is being opened, or given back, may wait for a file system.
        if storage.key in context.making or storage.released:
            continue
        with context.storage_locks.holding([storage.key]):
            current = context.catalogue.storage(storage.key)
            if current is None or current.released or storage.key in context.making | _users(context):
                continue
            _log.error("storage %s belongs to no snapshot that is known: released", storage.key)
            try:
                for warning in releasing.release(context, current):
                    _log.warning("%s", warning)
            except (OSError, BlksnapError) as error:
                _log.error("storage %s: %s", storage.key, error)


def _users(context: Context) -> set[str]:
    return {entry.storage_key for entry in context.catalogue.snapshots()}


def _storage_keys(context: Context) -> set[str]:
    return _users(context) | {storage.key for storage in context.catalogue.storages()}


def _remove_unstarted(context: Context, keys: Collection[str]) -> None:
    """ublk devices that were added and never got into the catalogue, or were left when they were to be deleted.

    An attach, or a snapshot of another device, that is under way may have added one and not yet written it down.
    """
    existing = context.disks.ours()
    if any(entry.phase is Phase.CREATING and entry.key not in keys for entry in context.catalogue.devices()) or any(
        entry.phase is Phase.CREATING and any(member not in keys for member in entry.members)
        for entry in context.catalogue.snapshots()
    ):
        return
    ours = {entry.served.ublk_id for entry in context.catalogue.devices() if entry.served is not None}
    ours |= {
        image.served.ublk_id
        for entry in context.catalogue.snapshots()
        for image in entry.images
        if image.served is not None
    }
    for info in existing:
        if info.id in ours:
            continue
        if info.state is DeviceState.DEAD:
            context.disks.delete(info.id, in_use=True)
        else:
            _log.warning("/dev/ublkb%d was left by a former daemon, and nothing is known of it", info.id)


def _release_numbers(context: Context, keys: Collection[str]) -> None:
    held = {(image.device, image.change_number) for entry in context.catalogue.snapshots() for image in entry.images}
    for key in keys:
        history = context.histories.get(key)
        for number in history.held if history is not None else ():
            if history is not None and (key, number) not in held:
                history.destroy(number)


def _held_names(context: Context) -> list[str]:
    try:
        return context.keeper.names()
    except OSError as error:
        _log.error("the keeper does not answer: %s", error)
        return []


def _remove_descriptors(
    context: Context, names: Collection[str], storage_keys: Collection[str], devices: Collection[str]
) -> None:
    for name in names:
        kind, _, rest = name.partition(":")
        key = rest.partition(":")[0]
        if (kind == "origin" and key not in devices) or (kind == "storage" and key not in storage_keys):
            with suppress(OSError):
                context.keeper.drop(name)


def _remove_files(
    context: Context,
    files: Collection[str],
    known: Collection[str],
    devices: Collection[str],
) -> None:
    """`known`: the ids of snapshots and the keys of storages."""
    for name in files:
        of_snapshot, of_storage = _OF_SNAPSHOT.fullmatch(name), _OF_STORAGE.fullmatch(name)
        of_device = _OF_DEVICE.fullmatch(name)
        unknown = (
            (of_snapshot is not None and of_snapshot["id"] not in known)
            or (of_storage is not None and of_storage["key"] not in known)
            or (of_device is not None and of_device["key"] not in devices)
        )
        if unknown:
            context.state.remove(name)


def _tried(subject: str, context: Context, message: messages.Message) -> None:
    try:
        context.io.end(message)
    except BlksnapError as error:
        _log.error("%s: %s", subject, error)
