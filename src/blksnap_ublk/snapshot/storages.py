# SPDX-License-Identifier: MIT
"""The difference storage of a snapshot: opened, kept by the keeper, given to the io process, and released again."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from blksnap_ublk.errors import BlksnapError, Busy, Failed
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.keeper.ring_locks import RingLocks
from blksnap_ublk.snapshot import host_view
from blksnap_ublk.snapshot.catalogue import AreaEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.state_files import records_bytes, storage_state_bytes
from blksnap_ublk.snapshot.storage import AreaKind, Identity, OpenArea, OpenAreas, UsedRange, open_storage
from blksnap_ublk.snapshot.storage.files import write_ahead
from blksnap_ublk.snapshot.undoing import quietly

WRITE_AHEAD = 128 << 20
"""Bytes of a storage that are written with zeroes before it is used, where its files have never been written."""

_LATE_WRITES_LIMIT = 1.0  # seconds for the storage to end what a dead io process has sent it


def open_areas(context: Context, specs: Sequence[Spec], *, limit: int | None, needed: int, unit: int) -> OpenAreas:
    """Opens what the user named, apart from what is in use by us. All sizes in bytes. Raises BlksnapError."""
    try:
        return _open(context, [replace(spec, path=host_view.find(spec.path)) for spec in specs], limit, needed, unit)
    except BlksnapError as error:
        raise type(error)(host_view.name(error.message)) from None


def _open(context: Context, specs: Sequence[Spec], limit: int | None, needed: int, unit: int) -> OpenAreas:
    return open_storage(
        specs,
        registry=context.registry,
        off_limits=_off_limits(context),
        used=used_ranges(context),
        limit=limit,
        needed=needed,
        unit=unit,
    )


def former_sizes(specs: Sequence[Spec]) -> dict[str, int]:
    """The sizes of the files that are named; -1 for one that does not exist yet."""
    found = {}
    for spec in specs:
        try:
            found[spec.path] = Path(host_view.find(spec.path)).stat().st_size
        except OSError:
            found[spec.path] = -1
    return found


def announce(key: str, specs: Sequence[Spec], former: dict[str, int], *, unit: int, limit: int | None) -> StorageEntry:
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


def describe(key: str, opened: OpenAreas, former: dict[str, int], *, unit: int, limit: int | None) -> StorageEntry:
    """The catalogue's entry of a storage named `key`."""
    return StorageEntry(
        key=key,
        unit=unit,
        limit=limit,
        on_overflow="break",
        areas=[_area_entry(f"storage:{key}:{n}", area, former) for n, area in enumerate(opened.areas)],
    )


def give(context: Context, storage: StorageEntry, opened: OpenAreas, undo: ExitStack) -> None:
    """Puts the descriptors with the keeper and makes the storage known to the io process.

    Raises Failed, IoRefused, OSError; `undo` then takes everything back.
    """
    undo.callback(quietly, drop, context, storage)
    ahead = WRITE_AHEAD
    for entry, area in zip(storage.areas, opened.areas, strict=True):
        context.keeper.put(entry.descriptor, area.fd)
        if not area.written:
            length = min(area.length, ahead) // area.alignment * area.alignment
            write_ahead(area.fd, area.start_byte, length)
            ahead -= length
    state = context.state.create(_state_name(storage), storage_state_bytes())
    try:
        context.io.call(messages.OpenStorage(storage.key, storage.unit), [state])
    finally:
        os.close(state)
    for n, area in enumerate(opened.areas):
        records = context.state.create(_records_name(storage, n), records_bytes(area.length, storage.unit))
        try:
            message = messages.AddArea(storage.key, area.start_byte, area.length)
            context.io.call(message, [area.fd, records])
        finally:
            os.close(records)


def hold(context: Context, opened: OpenAreas) -> None:
    """Ends the life of `opened` as an object; `release` gives its files back, in this process or in the next."""
    for area in opened.areas:
        context.registry.adopt(area.identity, area.fd)
    opened.close()


def drop(context: Context, storage: StorageEntry) -> None:
    """Takes a storage from the io process and the keeper, and removes its state files; repeatable. Raises Failed."""
    context.io.end(messages.CloseStorage(storage.key))
    forget(context, storage)


def forget(context: Context, storage: StorageEntry) -> None:
    """The part of `drop` that needs no io process."""
    context.state.remove(_state_name(storage))
    for n, area in enumerate(storage.areas):
        context.state.remove(_records_name(storage, n))
        with suppress(OSError):
            context.keeper.drop(area.descriptor)


def release(context: Context, storage: StorageEntry) -> list[str]:
    """After `drop`: closes the files and cuts back those that were made for it; what could not be done, in words."""
    warnings = []
    for area in storage.areas:
        if area.length:
            with suppress(KeyError):
                context.registry.release(Identity(DeviceNumber(*area.filesystem), area.inode))
        if area.former_size is not None:
            try:
                _restore(area)
            except OSError as error:
                warnings.append(f"{area.path}: could not be cut back to its former size: {error.strerror}")
    return warnings


def adopt(context: Context, storage: StorageEntry) -> None:
    """After a restart of this process: takes the descriptors back from the keeper. Raises Failed."""
    for area in storage.areas:
        try:
            descriptor = context.keeper.get(area.descriptor)
        except OSError as error:
            raise Failed("the storage is no longer held", subject=area.path, errno="ENOENT") from error
        context.registry.adopt(Identity(DeviceNumber(*area.filesystem), area.inode), descriptor)


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
    unit = storage.unit
    places = [area.length // unit for area in storage.areas]
    state = context.state.storage_state(_state_name(storage))
    left = state.used if state is not None else 0
    used = []
    for count in places:
        used.append(min(left, count) * unit)
        left -= min(left, count)
    return used, sum(places) * unit


def used_ranges(context: Context) -> list[UsedRange]:
    """What all difference storages hold."""
    return [
        UsedRange(Identity(DeviceNumber(*area.filesystem), area.inode), area.offset, area.length)
        for entry in context.catalogue.snapshots()
        for area in entry.storage.areas
        if area.length
    ]


def _state_name(storage: StorageEntry) -> str:
    return f"storage-{storage.key}"


def _records_name(storage: StorageEntry, n: int) -> str:
    return f"records-{storage.key}.{n}"


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
