# SPDX-License-Identifier: MIT
"""Difference storages: opened, kept by the keeper, given to the io process; released with their last snapshot."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from blksnap_ublk.errors import BlksnapError, Busy, Failed
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.keeper.ring_locks import RingLocks
from blksnap_ublk.snapshot import host_view, naming
from blksnap_ublk.snapshot.catalogue import AreaEntry, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.state_files import PAGE, records_bytes, storage_state_bytes
from blksnap_ublk.snapshot.storage import AreaKind, Identity, OpenArea, OpenAreas, UsedRange, open_storage
from blksnap_ublk.snapshot.storage.files import write_ahead
from blksnap_ublk.snapshot.undoing import quietly

WRITE_AHEAD = 128 << 20
"""Bytes of a storage that are written with zeroes before it is used, where its files have never been written."""

_LATE_WRITES_LIMIT = 1.0  # seconds for the storage to end what a dead io process has sent it


@dataclass(frozen=True)
class NewStorage:
    """A storage in the making: its entry, and the areas as they were opened."""

    entry: StorageEntry
    opened: OpenAreas


def make(
    context: Context, key: str, specs: Sequence[Spec], *, limit: int | None, needed: int, unit: int, undo: ExitStack
) -> NewStorage:
    """Opens what the user named and makes it known to the keeper and the io process. All sizes in bytes.

    The caller ends with `hold`. Raises BlksnapError, IoRefused, OSError; `undo` then takes everything back.
    """
    with context.storage_locks.holding(_files_of(specs)):
        former = _former_sizes(specs)
        undo.callback(context.catalogue.remove_storage, key)
        context.catalogue.put_storage(_announced(key, specs, former, unit=unit, limit=limit))
        opened = _open(context, specs, limit=limit, needed=needed, unit=unit)
        undo.callback(opened.undo)
        areas = [_area_entry(_descriptor_name(key, n), area, former) for n, area in enumerate(opened.areas)]
        entry = StorageEntry(key=key, unit=unit, limit=limit, on_overflow="break", areas=areas)
        context.catalogue.put_storage(entry)
    _give(context, entry, opened, undo)
    return NewStorage(entry, opened)


def hold(context: Context, made: NewStorage) -> None:
    """Ends the life of `made` as an object; `leave` gives its files back, in this process or in the next."""
    for area in made.opened.areas:
        context.registry.adopt(area.identity, area.fd)
    context.open_storages.add(made.entry.key)
    made.opened.close()


def adopt(context: Context, storage: StorageEntry) -> None:
    """After a restart of this process: takes the descriptors back from the keeper. Raises Failed."""
    if storage.key in context.open_storages:
        return
    with ExitStack() as undo:
        for area in storage.areas:
            try:
                descriptor = context.keeper.get(area.descriptor)
            except OSError as error:
                raise Failed("the storage is no longer held", subject=area.path, errno="ENOENT") from error
            identity = _identity(area)
            context.registry.adopt(identity, descriptor)
            undo.callback(context.registry.release, identity)
        undo.pop_all()
    context.open_storages.add(storage.key)


def leave(context: Context, snapshot: SnapshotEntry) -> list[str]:
    """Takes a snapshot, whose images the io process has dropped, out of the catalogue, and with the last one of its
    storage the storage: its files are closed, and cut back where they were made longer for it.

    Returns what could not be done, in words. Raises Failed; it may be called again then.
    """
    key = snapshot.storage_key
    with context.storage_locks.holding([key]):
        warnings = []
        if all(other.id == snapshot.id for other in naming.snapshots_in(context.catalogue, key)):
            warnings = release(context, of(context, snapshot))
        context.catalogue.remove_snapshot(snapshot.id)
    return warnings


def release(context: Context, storage: StorageEntry) -> list[str]:
    """Ends a storage that no snapshot uses, for a caller that holds its lock; as `leave`."""
    _drop(context, storage)
    warnings = []
    held = storage.key in context.open_storages
    context.open_storages.discard(storage.key)
    for area in storage.areas:
        if held:
            context.registry.release(_identity(area))
        if area.former_size is not None:
            try:
                _restore(area)
            except OSError as error:
                warnings.append(f"{area.path}: could not be cut back to its former size: {error.strerror}")
    context.catalogue.remove_storage(storage.key)
    return warnings


def of(context: Context, snapshot: SnapshotEntry) -> StorageEntry:
    """The storage of a snapshot; one without areas where its entry was damaged."""
    found = context.catalogue.storage(snapshot.storage_key)
    if found is not None:
        return found
    unit = snapshot.images[0].unit if snapshot.images else PAGE
    return StorageEntry(key=snapshot.storage_key, unit=unit, limit=None, on_overflow="break", areas=[])


def refuse_late_writes(context: Context, snapshot: str) -> None:
    """For a storage of an io process that has died: its space must not be given back before its last write has ended.

    Waits a moment for that, then raises Busy.
    """
    locks = RingLocks(context.state.directory)
    end = time.monotonic() + _LATE_WRITES_LIMIT
    while True:
        held = locks.held()
        if held <= {max(held, default=0)}:  # the youngest is that of the io process of now
            return
        if time.monotonic() > end:
            text = "its storage does not answer: writes of the io process that died are still under way"
            raise Busy(text, subject=f"snapshot {snapshot}", errno="EBUSY", advice="try again when they have ended")
        time.sleep(0.05)


def used_bytes(context: Context, storage: StorageEntry) -> tuple[list[int], int]:
    """Bytes used in each area, and the capacity of all, as the io process last wrote them."""
    state = context.state.storage_state(_state_name(storage.key))
    places = state.areas if state is not None else ()
    used = [count * storage.unit for count in places[: len(storage.areas)]]
    used += [0] * (len(storage.areas) - len(used))
    return used, sum(area.length // storage.unit for area in storage.areas) * storage.unit


def used_ranges(context: Context) -> list[UsedRange]:
    """What all difference storages hold."""
    return [
        UsedRange(_identity(area), area.offset, area.length)
        for storage in context.catalogue.storages()
        for area in storage.areas
        if area.length
    ]


def file_systems(context: Context) -> set[DeviceNumber]:
    """The device numbers (st_dev) of the file systems that hold difference storage."""
    return {
        DeviceNumber(*area.filesystem)
        for storage in context.catalogue.storages()
        for area in storage.areas
        if area.inode
    }


def _files_of(specs: Sequence[Spec]) -> set[str]:
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


def _open(context: Context, specs: Sequence[Spec], *, limit: int | None, needed: int, unit: int) -> OpenAreas:
    try:
        return open_storage(
            [replace(spec, path=host_view.find(spec.path)) for spec in specs],
            registry=context.registry,
            off_limits=_off_limits(context),
            used=used_ranges(context),
            limit=limit,
            needed=needed,
            unit=unit,
        )
    except BlksnapError as error:
        raise type(error)(host_view.name(error.message)) from None


def _former_sizes(specs: Sequence[Spec]) -> dict[str, int]:
    """The sizes of the files that are named; -1 for one that does not exist yet."""
    found = {}
    for spec in specs:
        try:
            found[spec.path] = Path(host_view.find(spec.path)).stat().st_size
        except OSError:
            found[spec.path] = -1
    return found


def _announced(
    key: str, specs: Sequence[Spec], former: dict[str, int], *, unit: int, limit: int | None
) -> StorageEntry:
    """The catalogue's entry before anything is opened: all that it says is which files may be made longer.

    So they are cut back should this process die before there is more to say.
    """
    areas = []
    for path in dict.fromkeys(spec.path for spec in specs if former[spec.path] >= 0):
        with suppress(OSError):
            status = os.stat(host_view.find(path))
            if stat.S_ISREG(status.st_mode):
                device = DeviceNumber.of(status.st_dev)
                number = (device.major, device.minor)
                areas.append(AreaEntry(path, "", number, status.st_ino, 0, 0, former_size=former[path]))
    return StorageEntry(key=key, unit=unit, limit=limit, on_overflow="break", areas=areas)


def _give(context: Context, storage: StorageEntry, opened: OpenAreas, undo: ExitStack) -> None:
    """Puts the descriptors with the keeper and makes the storage known to the io process."""
    undo.callback(quietly, _drop, context, storage)
    ahead = WRITE_AHEAD
    for entry, area in zip(storage.areas, opened.areas, strict=True):
        context.keeper.put(entry.descriptor, area.fd)
        if not area.written:
            length = min(area.length, ahead) // area.alignment * area.alignment
            write_ahead(area.fd, area.start_byte, length)
            ahead -= length
    state = context.state.create(_state_name(storage.key), storage_state_bytes())
    try:
        context.io.call(messages.OpenStorage(storage.key, storage.unit), [state])
    finally:
        os.close(state)
    for n, area in enumerate(opened.areas):
        records = context.state.create(_records_name(storage.key, n), records_bytes(area.length, storage.unit))
        try:
            message = messages.AddArea(storage.key, area.start_byte, area.length)
            context.io.call(message, [area.fd, records])
        finally:
            os.close(records)


def _drop(context: Context, storage: StorageEntry) -> None:
    """Takes a storage from the io process and the keeper, and removes its state files; repeatable. Raises Failed."""
    context.io.end(messages.CloseStorage(storage.key))
    context.state.remove(_state_name(storage.key))
    prefix = _records_name(storage.key, None)
    for name in context.state.names():
        if name.startswith(prefix):
            context.state.remove(name)
    with suppress(OSError):
        for name in context.keeper.names():
            if name.startswith(_descriptor_name(storage.key, None)):
                context.keeper.drop(name)


def _state_name(key: str) -> str:
    return f"storage-{key}"


def _records_name(key: str, n: int | None) -> str:
    """Of area `n`; with None what the names of all begin with."""
    return f"records-{key}." + ("" if n is None else str(n))


def _descriptor_name(key: str, n: int | None) -> str:
    """The same for what the keeper holds."""
    return f"storage:{key}:" + ("" if n is None else str(n))


def _identity(area: AreaEntry) -> Identity:
    return Identity(DeviceNumber(*area.filesystem), area.inode)


def _area_entry(descriptor: str, area: OpenArea, former: dict[str, int]) -> AreaEntry:
    path = host_view.name(area.path)
    before = former.get(path)
    changed = area.kind is AreaKind.FILE and before is not None and os.fstat(area.fd).st_size > before
    return AreaEntry(
        path=path,
        descriptor=descriptor,
        filesystem=(area.identity.device.major, area.identity.device.minor),
        inode=area.identity.inode,
        offset=area.start_byte,
        length=area.length,
        former_size=before if changed else None,
    )


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


def _restore(area: AreaEntry) -> None:
    """Only if the path still leads to the same file."""
    assert area.former_size is not None
    path = host_view.find(area.path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        device = DeviceNumber.of(status.st_dev)
        if ((device.major, device.minor), status.st_ino) != (area.filesystem, area.inode):
            return
        if area.former_size < 0:
            os.unlink(path)
        elif status.st_size > area.former_size:
            os.ftruncate(descriptor, area.former_size)
    except FileNotFoundError:
        pass
    finally:
        os.close(descriptor)
