# SPDX-License-Identifier: MIT
"""Difference storages: opened, kept by the keeper, given to the io process; released with their last snapshot."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
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
from blksnap_ublk.snapshot.storage import AreaKind, Identity, OpenAreas, Planned, UsedRange, open_storage
from blksnap_ublk.snapshot.storage.behaviour import Facts, decide
from blksnap_ublk.snapshot.storage.beneath import Seat
from blksnap_ublk.snapshot.storage.files import unwritten, write_ahead
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
    """Opens what the user named and gives it space, which may take long and wait for file systems. `needed` in bytes.

    So it is for a caller that holds no locks of devices, but with `seats`, those paths that lie on filtered devices:
    then it is for one that holds their locks. `wanted` is what is known of the storage so far: all but its areas.
    `Context.making` has its key until the caller takes that away, once a snapshot uses it. Then come `give` and `hold`.
    Raises BlksnapError, OSError; `undo` then takes everything back.
    """

    def announce(planned: Sequence[Planned]) -> None:
        context.catalogue.put_storage(msgspec.structs.replace(wanted, announced=announced(planned)))

    with context.storage_locks.holding(files_of(specs)):
        context.making.add(wanted.key)
        undo.callback(context.making.discard, wanted.key)
        undo.callback(context.catalogue.remove_storage, wanted.key)
        context.catalogue.put_storage(wanted)
        opened = open_areas(
            context, specs, limit=wanted.limit, needed=needed, unit=wanted.unit, seats=seats, announce=announce
        )
        undo.callback(opened.undo)
        areas = area_entries(wanted.key, 0, specs, opened)
        entry = msgspec.structs.replace(wanted, areas=areas)
        context.catalogue.put_storage(entry)
    write_areas_ahead(opened)
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
    missing = [path for path in (host_view.find(spec.path) for spec in specs) if not os.path.exists(path)]
    return {os.path.realpath(path) for path in missing} | {f"{each.device} {each.inode}" for each in named(specs)}


def open_areas(
    context: Context,
    specs: Sequence[Spec],
    *,
    limit: int | None,
    needed: int,
    unit: int,
    announce: Callable[[Sequence[Planned]], None],
    seats: Mapping[str, Seat] = MappingProxyType({}),
) -> OpenAreas:
    """As `open_storage`, with all that is known here of what it must not touch. Raises BlksnapError, OSError."""
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
            announce=announce,
        )
    except BlksnapError as error:
        raise type(error)(host_view.name(error.message)) from None


def announced(planned: Sequence[Planned]) -> list[AreaEntry]:
    """What the catalogue says before files are changed: they are as before again should this process die soon."""
    return [
        AreaEntry(
            path=host_view.name(file.path),
            descriptor="",
            filesystem=(file.identity.device.major, file.identity.device.minor),
            inode=file.identity.inode,
            offset=0,
            length=0,
            former_size=file.former_size,
            beneath=file.beneath,
            longest=file.size,
        )
        for file in {file.identity: file for file in planned}.values()
    ]


def files_of_others(context: Context, key: str) -> set[Identity]:
    """The files of all storages but that of this key."""
    return {
        identity(area)
        for storage in context.catalogue.storages()
        if storage.key != key
        for area in (*storage.areas, *storage.announced)
    }


def write_areas_ahead(opened: OpenAreas) -> None:
    """The first bytes of new areas that were never written. Raises OSError."""
    ahead = WRITE_AHEAD
    for area in opened.areas:
        if area.written:
            continue
        # Data that lies in the file must still be there should the storage not come about.
        for start, length in unwritten(area.fd, area.start_byte, area.length, area.alignment):
            now = min(length, ahead) // area.alignment * area.alignment
            if now:
                write_ahead(area.fd, start, now)
            ahead -= now


def give(context: Context, made: NewStorage, undo: ExitStack) -> None:
    """Puts the descriptors with the keeper and makes the storage known to the io process.

    Raises BlksnapError, IoRefused, OSError; `undo` then takes that back.
    """
    storage, opened = made.entry, made.opened
    undo.callback(quietly, drop, context, storage)
    held = {entry.descriptor: area.fd for entry, area in zip(storage.areas, opened.areas, strict=True)}
    for name, descriptor in held.items():
        context.keeper.put(name, descriptor)
    opened.keep()
    same_device.mark(context, storage.areas)
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
    tell_behaviour(context, storage, used=0)


def tell_behaviour(context: Context, storage: StorageEntry, used: int) -> None:
    """What the io process is to do when it gets full; `used` in bytes. Raises IoRefused, Failed."""
    room = (_UNLIMITED if storage.limit is None else storage.limit - storage.capacity) if grows(storage) else 0
    policy = overflow.parse(storage.on_overflow)
    used = min(used, storage.capacity)
    facts = Facts(storage.unit, storage.capacity, used, room, policy, rest=storage.limit is not None)
    decision = decide(facts)
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
        message = messages.AddArea(storage.key, area.offset, area.length, held=area.descriptor)
        context.io.call(message, [descriptor, records])
        return
    assert area.physical is not None
    name = naming.origin_descriptor_name(area.beneath)
    origin = context.keeper.get(name)
    try:
        message = messages.AddArea(storage.key, area.physical, area.length, area.beneath, held=name)
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


def files(storage: StorageEntry) -> set[Identity]:
    """The files and block devices of a storage, also those that were about to become its own."""
    return {identity(area) for area in (*storage.areas, *storage.announced)}


def named(specs: Sequence[Spec]) -> set[Identity]:
    """The files and block devices that are named; what is not there yet, and directories, are left out."""
    found = set()
    for spec in specs:
        with suppress(OSError):
            status = os.stat(host_view.find(spec.path))
            if stat.S_ISBLK(status.st_mode):
                found.add(Identity(DeviceNumber.of(status.st_rdev), 0))
            elif stat.S_ISREG(status.st_mode):
                found.add(Identity(DeviceNumber.of(status.st_dev), status.st_ino))
    return found


def area_entries(key: str, first: int, specs: Sequence[Spec], opened: OpenAreas) -> list[AreaEntry]:
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
        size = os.fstat(area.fd).st_size if area.former_size is not None else 0
        longer = area.former_size is not None and (grows or size > area.former_size)
        found.append(
            AreaEntry(
                path=path,
                descriptor=name,
                filesystem=(area.identity.device.major, area.identity.device.minor),
                inode=area.identity.inode,
                offset=area.start_byte,
                length=area.length,
                former_size=area.former_size if longer else None,
                beneath=area.beneath,
                physical=area.physical,
                grows=grows,
                longest=size if longer else 0,
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
