# SPDX-License-Identifier: MIT
"""Storage beneath filtered devices, seen from the devices: which of them it lies on, and what follows for their images.

What lies beneath a device is exempt from copy-on-write in all images taken while it is there: they read zeroes in its
place. It counts as changed when it becomes storage and when it ceases to be.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress

import msgspec

from blksnap_ublk.errors import BlksnapError, Busy, Failed, Unsupported, UsageError, errno_symbol
from blksnap_ublk.host import blockdev, mounts, stack
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import host_view, naming
from blksnap_ublk.snapshot.catalogue import AreaEntry, DeviceEntry, ImageEntry, Phase, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.storage import Identity
from blksnap_ublk.snapshot.storage.beneath import Seat, partition_start, pieces_of
from blksnap_ublk.snapshot.storage.reservation import GivingBack, verify

_RANGES_A_MESSAGE = 1 << 12
_MAP_BYTES_OF_A_RANGE = 2 << 10  # an end of an exempt range needs 1 KiB of map memory
_MAP_REACH = 256 << 20
_MAP_BYTES_OF_A_REACH = 4 << 10


def seats(context: Context, specs: Sequence[Spec]) -> dict[str, Seat]:
    """The paths of those SPECs that are files or directories on a file system directly on a filtered device.

    Raises Busy for a file that is storage already, UsageError for one that two SPECs name. Asks file systems: not for a
    caller that holds locks of devices.
    """
    places = _filtered(context)
    used = {
        Identity(DeviceNumber(*area.filesystem), area.inode)
        for storage in context.catalogue.storages()
        for area in storage.areas
        if area.beneath is not None
    }
    found: dict[str, Seat] = {}
    named = set()
    for spec in specs if places else ():
        path = host_view.find(spec.path)
        try:
            status = os.stat(path)
        except FileNotFoundError:
            try:
                status = os.stat(os.path.dirname(path))
            except OSError:
                continue
        except OSError:
            continue
        number = DeviceNumber.of(status.st_dev)
        if stat.S_ISBLK(status.st_mode) or number not in places:
            continue
        if stat.S_ISREG(status.st_mode) and (number, status.st_ino) in named:
            raise UsageError("is named twice", subject=spec.path, advice="write all ranges of a file as one SPEC")
        named.add((number, status.st_ino))
        if Identity(number, status.st_ino) in used:
            text = "holds the storage of another snapshot"
            raise Busy(text, subject=spec.path, errno="EBUSY", advice="name another file, or destroy that one first")
        found[spec.path] = places[number]
    return found


def devices_beneath(storage: StorageEntry | None) -> set[str]:
    """The keys of the filtered devices beneath which a storage lies, or is about to."""
    if storage is None:
        return set()
    return {area.beneath for area in (*storage.areas, *storage.announced) if area.beneath is not None}


def storages_beneath(context: Context, device: str) -> set[str]:
    """The keys of the storages that lie, or are about to, beneath the device of that key."""
    return {storage.key for storage in context.catalogue.storages() if device in devices_beneath(storage)}


def snapshots_on(context: Context, device: str) -> list[SnapshotEntry]:
    """The snapshots whose storage lies beneath the device of that key, oldest first."""
    keys = storages_beneath(context, device)
    return [entry for entry in context.catalogue.snapshots() if entry.storage_key in keys]


def refuse_held(context: Context, found: Collection[Seat]) -> None:
    """Raises Unsupported for a device with a snapshot: the space that its file system hands out now may hold live data
    of that instant.
    """
    for seat in found:
        held = naming.snapshots_of(context.catalogue, seat.device)
        if held:
            text = (
                f"has snapshot {held[0].id}, and space on its file system that becomes storage now may hold data of"
                " that instant"
            )
            advice = f"share the storage of a snapshot with --storage @{held[0].id}, or name storage on another device"
            raise Unsupported(text, subject=seat.path, advice=advice)


def exempt_ranges(context: Context, device: str) -> list[tuple[int, int]]:
    """What of the device of that key is difference storage, as (start, length) in bytes, joined and in order."""
    found: list[tuple[int, int]] = []
    for start, length in sorted(
        (area.physical, area.length)
        for storage in context.catalogue.storages()
        for area in storage.areas
        if area.beneath == device and area.physical is not None
    ):
        if found and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def map_bytes(ranges: Sequence[tuple[int, int]]) -> int:
    """Map memory that exempting these ranges in one image needs, in bytes."""
    reached = {n for start, length in ranges for n in range(start // _MAP_REACH, (start + length) // _MAP_REACH + 1)}
    return len(ranges) * _MAP_BYTES_OF_A_RANGE + len(reached) * _MAP_BYTES_OF_A_REACH


def exempt(context: Context, image: ImageEntry) -> None:
    """Before its instant: the image reads zeroes where its device holds storage. Raises IoRefused, Failed."""
    ranges = exempt_ranges(context, image.device)
    for begin in range(0, len(ranges), _RANGES_A_MESSAGE):
        context.io.call(messages.Exempt(image.key, ranges[begin : begin + _RANGES_A_MESSAGE]))


def mark(context: Context, areas: Sequence[AreaEntry]) -> None:
    """Makes areas that lie beneath filtered devices part of their next increments. Raises Failed.

    For a caller that holds the locks of these devices.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for area in areas:
        if area.beneath is not None and area.physical is not None and area.length:
            ranges.setdefault(area.beneath, []).append((area.physical, area.length))
    for key, found in ranges.items():
        device = context.catalogue.device(key)
        if device is None or (device.phase is Phase.DESTROYING and key in context.conditions):
            continue  # whoever serves it again begins another history
        for begin in range(0, len(found), _RANGES_A_MESSAGE):
            _mark(context, device, found[begin : begin + _RANGES_A_MESSAGE])


def _mark(context: Context, device: DeviceEntry, ranges: list[tuple[int, int]]) -> None:
    try:
        context.io.call(messages.Mark(device.key, ranges))
    except IoRefused as error:
        text = f"the blocks that hold storage cannot be marked as changed: {error.strerror or error}"
        advice = "try again when the device is served" if error.errno == errno.ENOENT else "try again"
        raise Failed(text, subject=device.origin, errno=errno_symbol(error.errno), advice=advice) from None


def refuse_unsettled(context: Context, device: DeviceEntry) -> None:
    """Before an image of a device is exempt from what lies beneath it: all of that is storage, and where it was.

    Raises Busy where something else is to be done with it first.
    """
    for storage in context.catalogue.storages():
        areas = [area for area in storage.areas if area.beneath == device.key]
        users = naming.snapshots_in(context.catalogue, storage.key)
        if not areas:
            continue
        if all(snapshot.phase is not Phase.ACTIVE for snapshot in users):
            text = "storage on it is being given back"
            raise Busy(text, subject=naming.block_path(device), errno="EBUSY", advice="try again soon")
        for own in _by_file(areas).values():
            changed = moved(context, own)
            if changed is not None:
                text = f"of the storage of snapshot {users[0].id} on it {changed} ({own[0].path})"
                advice = "destroy that snapshot first"
                raise Busy(text, subject=naming.block_path(device), errno="ESTALE", advice=advice)


def moved(context: Context, areas: Sequence[AreaEntry]) -> str | None:
    """What has changed, in words, about where the areas of one file lie; None: nothing.

    Raises Failed where its file system does not answer.
    """
    try:
        descriptor = context.keeper.get(areas[0].descriptor)
    except OSError:
        return "the file is no longer held"
    try:
        return verify(areas[0].path, descriptor, pieces_of(areas), context.io.lost)
    finally:
        os.close(descriptor)


def end(context: Context, storage: StorageEntry) -> StorageEntry:
    """The blocks of a storage that was closed, and wiped, cease to be storage; what is left are files to give back.

    For a caller that holds the locks of the devices. They count as changed, and no image is exempt from them any more.
    Raises Failed when a device cannot count them now; nothing has changed then. OSError.
    """
    seated = [area for area in storage.areas if area.beneath is not None]
    if not seated:
        return storage
    mark(context, seated)
    files = [
        msgspec.structs.replace(
            own[0], offset=0, length=0, physical=None, former_size=_former_size(own), longest=_longest(own)
        )
        for own in _by_file(seated).values()
    ]
    rest = [area for area in storage.areas if area.beneath is None]
    storage = msgspec.structs.replace(storage, areas=rest, announced=[*files, *storage.announced], wipe=False)
    context.catalogue.put_storage(storage)
    return storage


def give_back(context: Context, storage: StorageEntry, closing: ExitStack) -> list[str]:
    """Gives file systems the files back that lay beneath filtered devices, after `end`; warnings.

    The caller closes the files before it ends `closing`.
    """
    warnings = []
    for file, own in _by_file([area for area in storage.announced if area.beneath is not None]).items():
        area = own[0]
        descriptor = None
        with suppress(OSError):
            descriptor = context.keeper.get(area.descriptor) if area.descriptor else None
        try:
            path = host_view.find(area.path)
            given = closing.enter_context(
                GivingBack(path, file, descriptor, _former_size(own), _longest(own), context.io.lost)
            )
        finally:
            if descriptor is not None:
                os.close(descriptor)
        if given.warning is not None:
            warnings.append(host_view.name(f"{given.warning}; it may stay immutable: chattr -i {area.path}"))
    return warnings


def _former_size(areas: Sequence[AreaEntry]) -> int | None:
    return next((area.former_size for area in areas if area.former_size is not None), None)


def _longest(areas: Sequence[AreaEntry]) -> int:
    return max(area.longest for area in areas)


def _by_file(areas: Sequence[AreaEntry]) -> dict[Identity, list[AreaEntry]]:
    """Those with a descriptor first."""
    found: dict[Identity, list[AreaEntry]] = {}
    for area in sorted(areas, key=lambda area: not area.descriptor):
        found.setdefault(Identity(DeviceNumber(*area.filesystem), area.inode), []).append(area)
    return found


def refuse_origin_of_storage(context: Context, number: DeviceNumber, path: str) -> None:
    """Raises Busy where difference storage in use lies on a device that is to be attached, through any stack."""
    for storage in context.catalogue.storages():
        for area in storage.areas:
            if area.beneath is None and _lies_on(area, number):
                users = [entry.id for entry in naming.snapshots_in(context.catalogue, storage.key)]
                whose = f"of snapshot {', '.join(users)}" if users else "that is being given back"
                text = f"holds the difference storage {whose} ({area.path})"
                raise Busy(text, subject=path, errno="EBUSY", advice="destroy it first, or attach another device")


def _lies_on(area: AreaEntry, number: DeviceNumber) -> bool:
    holder = DeviceNumber(*area.filesystem)
    try:
        if area.inode and (holder, area.inode) in stack.files_beneath(number):
            return True
        if not area.inode and holder in stack.underlying_devices(number):
            return True
        holders = {holder, *mounts.beside(holder)} if area.inode else {holder}
        return any(number in stack.underlying_devices(each) | {each} for each in holders if each.major)
    except BlksnapError:
        return False


def _filtered(context: Context) -> dict[DeviceNumber, Seat]:
    """The filtered devices and their partitions, by the numbers that the files on them tell."""
    found = {}
    for entry in context.catalogue.devices():
        if entry.phase is not Phase.ACTIVE or entry.served is None:
            continue
        path = naming.block_path(entry)
        with suppress(OSError, BlksnapError):
            disk = DeviceNumber.of(os.stat(path).st_rdev)
            for number in (disk, *blockdev.partitions(disk)):
                found[number] = Seat(entry.key, path, entry.unit, number, partition_start(number))
    return found
