# SPDX-License-Identifier: MIT
"""Difference storages: opened, kept by the keeper, given to the io process; released with their last snapshot."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import msgspec

from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import host_view, naming, overflow, same_device
from blksnap_ublk.snapshot.catalogue import AreaEntry, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.state_files import PAGE, records_bytes, storage_state_bytes
from blksnap_ublk.snapshot.storage import AreaKind, Identity, OpenAreas, UsedRange, open_storage
from blksnap_ublk.snapshot.storage.behaviour import Facts, decide
from blksnap_ublk.snapshot.storage.beneath import Seat
from blksnap_ublk.snapshot.storage.files import write_ahead
from blksnap_ublk.snapshot.undoing import quietly

WRITE_AHEAD = 128 << 20
"""Bytes of a storage that are written with zeroes before it is used, where its files have never been written."""

_UNLIMITED = 1 << 62
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewStorage:
    """A storage in the making: its entry, and the areas as they were opened."""

    entry: StorageEntry
    opened: OpenAreas


def make(
    context: Context,
    wanted: StorageEntry,
    specs: Sequence[Spec],
    *,
    needed: int,
    undo: ExitStack,
    seats: Mapping[str, Seat] = MappingProxyType({}),
) -> NewStorage:
    """Opens what the user named and makes it known to the keeper and the io process. `needed` in bytes.

    `wanted` is what is known of it so far: all but its areas. `seats`: those paths that lie on filtered devices, whose
    locks the caller holds. The caller ends with `hold`. Raises BlksnapError, IoRefused, OSError; `undo` then takes
    everything back.
    """
    with context.storage_locks.holding(files_of(specs)):
        former = former_sizes(specs)
        undo.callback(context.catalogue.remove_storage, wanted.key)
        context.catalogue.put_storage(msgspec.structs.replace(wanted, announced=announced(specs, former, seats)))
        opened = open_areas(context, specs, limit=wanted.limit, needed=needed, unit=wanted.unit, seats=seats)
        undo.callback(opened.undo)
        areas = area_entries(wanted.key, 0, specs, opened, former)
        entry = msgspec.structs.replace(wanted, areas=areas)
        context.catalogue.put_storage(entry)
    _give(context, entry, opened, undo)
    return NewStorage(entry, opened)


def hold(context: Context, made: NewStorage) -> None:
    """Ends the life of `made` as an object; `leave` gives its files back, in this process or in the next."""
    for area in made.opened.areas:
        context.registry.adopt(area.identity, area.fd)
    context.open_storages.add(made.entry.key)
    made.opened.close()


def of(context: Context, snapshot: SnapshotEntry) -> StorageEntry:
    """The storage of a snapshot; one without areas where its entry was damaged."""
    found = context.catalogue.storage(snapshot.storage_key)
    if found is not None:
        return found
    unit = snapshot.images[0].unit if snapshot.images else PAGE
    return StorageEntry(key=snapshot.storage_key, unit=unit, limit=None, on_overflow="break", areas=[])


def used_bytes(context: Context, storage: StorageEntry) -> tuple[list[int], int]:
    """Bytes used in each area, and the capacity of all, as the io process last wrote them."""
    state = context.state.storage_state(naming.storage_state_name(storage.key))
    places = state.areas if state is not None else ()
    used = [count * storage.unit for count in places[: len(storage.areas)]]
    used += [0] * (len(storage.areas) - len(used))
    return used, storage.capacity


def grows(storage: StorageEntry) -> bool:
    """Whether it has files that are made longer when it fills, and its limit is not reached."""
    return any(area.grows for area in storage.areas) and (storage.limit is None or storage.capacity < storage.limit)


def used_ranges(context: Context) -> list[UsedRange]:
    """What all difference storages hold."""
    return [
        UsedRange(identity(area), area.offset, area.length)
        for storage in context.catalogue.storages()
        for area in storage.areas
        if area.length
    ]


def file_systems(context: Context) -> set[DeviceNumber]:
    """The device numbers (st_dev) of the file systems that difference storage is written through."""
    return {
        DeviceNumber(*area.filesystem)
        for storage in context.catalogue.storages()
        for area in storage.areas
        if area.inode and area.beneath is None
    }


def files_of(specs: Sequence[Spec]) -> set[str]:
    """What must not be opened by two at once: the names of locks."""
    found = set()
    for spec in specs:
        path = host_view.find(spec.path)
        try:
            status = os.stat(path)
        except OSError:
            found.add(os.path.realpath(path))
            continue
        if stat.S_ISBLK(status.st_mode):
            found.add(f"device {status.st_rdev}")
        elif stat.S_ISREG(status.st_mode):
            found.add(f"file {status.st_dev} {status.st_ino}")
    return found


def open_areas(
    context: Context,
    specs: Sequence[Spec],
    *,
    limit: int | None,
    needed: int,
    unit: int,
    seats: Mapping[str, Seat] = MappingProxyType({}),
) -> OpenAreas:
    try:
        return open_storage(
            [replace(spec, path=host_view.find(spec.path)) for spec in specs],
            registry=context.registry,
            off_limits=_off_limits(context),
            used=used_ranges(context),
            limit=limit,
            needed=needed,
            unit=unit,
            seats={host_view.find(path): seat for path, seat in seats.items()},
            given_up=context.io.lost,
        )
    except BlksnapError as error:
        raise type(error)(host_view.name(error.message)) from None


def former_sizes(specs: Sequence[Spec]) -> dict[str, int]:
    """The sizes of the files that are named; -1 for one that does not exist yet."""
    found = {}
    for spec in specs:
        try:
            found[spec.path] = Path(host_view.find(spec.path)).stat().st_size
        except OSError:
            found[spec.path] = -1
    return found


def announced(
    specs: Sequence[Spec], former: dict[str, int], seats: Mapping[str, Seat] = MappingProxyType({})
) -> list[AreaEntry]:
    """What the catalogue says before anything is opened: which files may be made longer.

    So they are cut back should this process die before there is more to say.
    """
    areas = []
    for path in dict.fromkeys(spec.path for spec in specs if former[spec.path] >= 0):
        with suppress(OSError):
            status = os.stat(host_view.find(path))
            if stat.S_ISREG(status.st_mode):
                device = DeviceNumber.of(status.st_dev)
                number = (device.major, device.minor)
                beneath = seats[path].device if path in seats else None
                areas.append(
                    AreaEntry(path, "", number, status.st_ino, 0, 0, former_size=former[path], beneath=beneath)
                )
    return areas


def write_areas_ahead(opened: OpenAreas) -> None:
    """The first bytes of new areas. Raises OSError."""
    ahead = WRITE_AHEAD
    for area in opened.areas:
        if not area.written:
            length = min(area.length, ahead) // area.alignment * area.alignment
            write_ahead(area.fd, area.start_byte, length)
            ahead -= length


def _give(context: Context, storage: StorageEntry, opened: OpenAreas, undo: ExitStack) -> None:
    """Puts the descriptors with the keeper and makes the storage known to the io process."""
    undo.callback(quietly, drop, context, storage)
    held = {entry.descriptor: area.fd for entry, area in zip(storage.areas, opened.areas, strict=True)}
    for name, descriptor in held.items():
        context.keeper.put(name, descriptor)
    opened.keep()
    same_device.mark(context, storage.areas)
    write_areas_ahead(opened)
    state = context.state.create(naming.storage_state_name(storage.key), storage_state_bytes())
    try:
        context.io.call(messages.OpenStorage(storage.key, storage.unit), [state])
    finally:
        os.close(state)
    for n, area in enumerate(opened.areas):
        records = make_records(context, storage, n)
        try:
            give_area(context, storage, n, area.fd, records)
        finally:
            os.close(records)
    room = (_UNLIMITED if storage.limit is None else storage.limit - storage.capacity) if grows(storage) else 0
    policy = overflow.parse(storage.on_overflow)
    decision = decide(Facts(unit=storage.unit, capacity=storage.capacity, used=0, room=room, on_overflow=policy))
    rate = storage.copy_rate or 0
    context.io.call(messages.SetStorage(storage.key, wait_ms=decision.wait_ms, low=decision.low, rate=rate))


def make_records(context: Context, storage: StorageEntry, n: int) -> int:
    """A descriptor of the records file of area `n`. Raises Failed where there is no room for it."""
    return context.state.create(
        naming.records_name(storage.key, n), records_bytes(storage.areas[n].length, storage.unit)
    )


def give_area(context: Context, storage: StorageEntry, n: int, descriptor: int, records: int) -> None:
    """Makes area `n` of a storage known to the io process; `descriptor` is that of its file.

    Raises IoRefused, OSError, and Failed when the io process has gone.
    """
    area = storage.areas[n]
    if area.beneath is None:
        context.io.call(messages.AddArea(storage.key, area.offset, area.length), [descriptor, records])
        return
    assert area.physical is not None
    origin = context.keeper.get(f"origin:{area.beneath}")
    try:
        message = messages.AddArea(storage.key, area.physical, area.length, area.beneath)
        context.io.call(message, [origin, records])
    finally:
        os.close(origin)


def drop(context: Context, storage: StorageEntry) -> None:
    """Takes a storage from the io process and the keeper, and removes its state files; repeatable. Raises Failed."""
    context.io.end(messages.CloseStorage(storage.key))
    forget(context, storage)


def forget(context: Context, storage: StorageEntry) -> None:
    """Removes what the keeper and the state directory have of a storage that the io process does not know any more."""
    context.state.remove(naming.storage_state_name(storage.key))
    prefix = naming.records_name(storage.key, None)
    for name in context.state.names():
        if name.startswith(prefix):
            context.state.remove(name)
    with suppress(OSError):
        for name in context.keeper.names():
            if name.startswith(naming.storage_descriptor_name(storage.key, None)):
                context.keeper.drop(name)


def identity(area: AreaEntry) -> Identity:
    return Identity(DeviceNumber(*area.filesystem), area.inode)


def area_entries(
    key: str, first: int, specs: Sequence[Spec], opened: OpenAreas, former: dict[str, int]
) -> list[AreaEntry]:
    """What the catalogue says of opened areas, of which the first is number `first` of the storage."""
    wholes = {spec.path for spec in specs if spec.ranges is None}
    found = []
    names: dict[Identity, str] = {}
    for n, area in enumerate(opened.areas, first):
        path = host_view.name(area.path)
        grows = area.kind is not AreaKind.DEVICE and path in wholes and area.beneath is None
        name = naming.storage_descriptor_name(key, n)
        if area.beneath is not None:  # a file lies there in many pieces
            name = names.setdefault(area.identity, name)
        before = former.get(path) if area.kind is AreaKind.FILE else None
        longer = before is not None and (grows or os.fstat(area.fd).st_size > before)
        found.append(
            AreaEntry(
                path=path,
                descriptor=name,
                filesystem=(area.identity.device.major, area.identity.device.minor),
                inode=area.identity.inode,
                offset=area.start_byte,
                length=area.length,
                former_size=before if longer else None,
                beneath=area.beneath,
                physical=area.physical,
                grows=grows,
            )
        )
    return found


def _off_limits(context: Context) -> set[DeviceNumber]:
    found = set()
    nodes = []
    for entry in context.catalogue.devices():
        found.add(DeviceNumber(*entry.number))
        if entry.served is not None:
            nodes.append(f"/dev/ublkb{entry.served.ublk_id}")
    for snapshot in context.catalogue.snapshots():
        nodes += [f"/dev/ublkb{image.served.ublk_id}" for image in snapshot.images if image.served is not None]
    for node in nodes:
        with suppress(OSError):
            found.add(DeviceNumber.of(os.stat(node).st_rdev))
    return found
