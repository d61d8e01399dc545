# SPDX-License-Identifier: MIT
"""Taking a snapshot: everything is reserved first, then one instant for all devices, then the images are started."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import msgspec

from blksnap_ublk.cbt import HistoryError
from blksnap_ublk.errors import (
    BlksnapError,
    Busy,
    Failed,
    NotFound,
    UsageError,
    errno_symbol,
    from_os_error,
)
from blksnap_ublk.forms import DeviceState, Freeze, SnapshotState, timestamp
from blksnap_ublk.host import blockdev
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import (
    destroy,
    lifetime,
    map_memory,
    naming,
    overflow,
    releasing,
    report,
    same_device,
    storages,
    taking,
    throttle,
)
from blksnap_ublk.snapshot.catalogue import DeviceEntry, ImageEntry, Phase, Served, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.hook_run import HookRun
from blksnap_ublk.snapshot.lifetime import Lifetime
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.state_files import PAGE, image_state_bytes
from blksnap_ublk.snapshot.storage.beneath import Seat
from blksnap_ublk.snapshot.undoing import quietly

_AT_ONCE = 8  # ublk devices that are made at the same time
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM)
_MORE_ROOM = "destroy snapshots, or restart the daemon with a larger --state-size"


@dataclass(frozen=True)
class CreateOptions:
    """What a user asks for. Raises UsageError.

    Difference storage is either made of `specs`, with `limit` in bytes, what `overflow.parse` reads as `on_overflow`,
    `wipe` and `copy_rate` in bytes per second, or is that of the snapshot whose full id is `join`. `partitions`: those
    on the images get nodes too. The snapshot ends by itself after `ttl` seconds, or with the process `while_pid`.
    """

    specs: Sequence[Spec] = ()
    limit: int | None = None
    on_overflow: str | None = None
    wipe: bool = False
    copy_rate: int | None = None
    freeze: Freeze = Freeze.TRY
    partitions: bool = False
    ttl: float | None = None
    while_pid: int | None = None
    join: str | None = None

    def __post_init__(self) -> None:
        if self.join is not None and (self.specs or self.limit is not None):
            text = "joins the storage of another snapshot, which is as large as it is"
            raise UsageError(text, subject=f"--storage @{self.join}", advice="leave out --limit and other storage")
        if self.join is not None and (self.on_overflow is not None or self.wipe or self.copy_rate is not None):
            text = "joins the storage of another snapshot, which does what it was made to do"
            raise UsageError(text, subject=f"--storage @{self.join}", advice="leave out what is said of the storage")
        if not self.specs and self.join is None:
            raise UsageError("no difference storage is named", advice="give --storage or --storage-file")
        if self.limit is not None and self.limit <= 0:
            raise UsageError(f"{self.limit} is not a positive number of bytes", subject="--limit")
        if self.on_overflow is not None:
            overflow.parse(self.on_overflow)
        if self.copy_rate is not None:
            throttle.check_copy_rate(self.copy_rate)

    def storage(self, key: str, unit: int) -> StorageEntry:
        """The storage of its own that is asked for, without areas."""
        return StorageEntry(
            key=key,
            unit=unit,
            limit=self.limit,
            on_overflow=self.on_overflow or overflow.Action.BREAK,
            areas=[],
            wipe=self.wipe,
            copy_rate=self.copy_rate,
        )


def create(context: Context, devices: Sequence[DeviceEntry], options: CreateOptions) -> tuple[SnapshotEntry, list[str]]:
    """One snapshot of all `devices` at one instant; the snapshot, and warnings. Its images exist on return.

    Raises Busy, Unsupported, UsageError, NotFound or Failed, naming the device that is at fault; then nothing has
    changed, but that change numbers may be used up.
    """
    if not devices:
        raise UsageError("no device is named")
    for n, device in enumerate(devices):
        if device.key in {other.key for other in devices[:n]}:
            raise UsageError("is named twice", subject=naming.block_path(device))
    lasts = lifetime.make(options.ttl, options.while_pid)
    seats = same_device.seats(context, options.specs)
    with HookRun(context.hooks) as hooks, _storage_made(context, devices, options, seats) as making:
        with context.locks.holding({device.key for device in devices} | _beneath(context, options, seats)):
            members = [_present(context, device) for device in devices]
            unit = _common_unit(members)
            _refuse_seats(context, seats)
            for member in members:
                same_device.refuse_unsettled(context, member)
            with _errors():
                entry, warnings = _create(context, members, unit, options, lasts, hooks, seats, making)
        return entry, [*warnings, *hooks.warnings()]


@dataclass
class _Making:
    """The storage of its own that a snapshot is to have. `undo` takes it back, unless it is emptied before.

    `made`: None until it is opened; with files on filtered devices that is once these are locked.
    """

    wanted: StorageEntry
    undo: ExitStack
    made: storages.NewStorage | None = None


@contextmanager
def _storage_made(
    context: Context, devices: Sequence[DeviceEntry], options: CreateOptions, seats: Mapping[str, Seat]
) -> Iterator[_Making]:
    """Before any device is locked: the storage may wait for a file system, and a device must not wait for that."""
    key = str(uuid.uuid4())
    with ExitStack() as undo:
        undo.callback(context.making.discard, key)
        making = _Making(options.storage(key, _common_unit(devices)), ExitStack())
        undo.callback(quietly, releasing.finish, context, key)
        undo.enter_context(making.undo)
        if options.join is None and not seats:
            with _errors():
                releasing.wait_for_named(context, options.specs)
                making.made = _open(context, devices, options, seats, making)
        yield making


def _open(
    context: Context,
    members: Sequence[DeviceEntry],
    options: CreateOptions,
    seats: Mapping[str, Seat],
    making: _Making,
) -> storages.NewStorage:
    needed = sum(member.size for member in members)
    return storages.make(context, making.wanted, options.specs, needed=needed, undo=making.undo, seats=seats)


def _beneath(context: Context, options: CreateOptions, seats: Mapping[str, Seat]) -> set[str]:
    """The keys of the devices beneath which the storage lies."""
    found = {seat.device for seat in seats.values()}
    other = None if options.join is None else context.catalogue.snapshot(options.join)
    return found if other is None else found | destroy.devices_of(context, other)


def _refuse_seats(context: Context, seats: Mapping[str, Seat]) -> None:
    """Once the devices are locked: each is there, served, and without a snapshot."""
    for seat in seats.values():
        device = context.catalogue.device(seat.device)
        if device is None:
            raise Failed("has been detached meanwhile", subject=seat.path)
        _present(context, device)
    same_device.refuse_held(context, seats.values())


def _present(context: Context, device: DeviceEntry) -> DeviceEntry:
    """The device as it is now that it is locked."""
    entry = context.catalogue.device(device.key)
    if entry is None or entry.phase is not Phase.ACTIVE or entry.served is None:
        raise Failed("has been detached meanwhile", subject=device.origin)
    if context.conditions.get(entry.key, DeviceState.LIVE) is not DeviceState.LIVE:
        raise Busy("is being recovered", subject=naming.block_path(entry), errno="EBUSY", advice="try again soon")
    if any(snapshot.id in context.unsettled for snapshot in naming.snapshots_of(context.catalogue, entry.key)):
        text = "a snapshot of it that failed is being taken back"
        raise Busy(text, subject=naming.block_path(entry), errno="EBUSY", advice="try again soon")
    return entry


def _common_unit(members: Sequence[DeviceEntry]) -> int:
    """The unit of all members, which is that of their storage."""
    first = members[0]
    for member in members[1:]:
        if member.unit != first.unit:
            text = f"has a unit of {member.unit} bytes, and {naming.block_path(first)} one of {first.unit}"
            advice = "take a snapshot of each, or attach both with the same --unit"
            raise UsageError(text, subject=naming.block_path(member), advice=advice)
    return first.unit


def _create(
    context: Context,
    members: Sequence[DeviceEntry],
    unit: int,
    options: CreateOptions,
    lasts: Lifetime,
    hooks: HookRun,
    seats: Mapping[str, Seat],
    making: _Making,
) -> tuple[SnapshotEntry, list[str]]:
    made = making.made
    kept = False
    with ExitStack() as undo:
        entry = SnapshotEntry(
            id=str(uuid.uuid4()),
            created=timestamp(time.time()),
            phase=Phase.CREATING,
            frozen=False,
            gate_us=0,
            images=[],
            storage_key=making.wanted.key,
            members=[member.key for member in members],
            partitions=options.partitions,
            ttl=lasts.ttl,
            while_pid=lasts.while_pid,
            while_pid_start=lasts.while_pid_start,
        )
        if options.join is not None:
            entry = _joined(context, entry, options.join, unit, undo)
        else:
            undo.callback(context.catalogue.remove_snapshot, entry.id)
            context.catalogue.put_snapshot(entry)
            if made is None:
                undo.push(making.undo)
                made = _open(context, members, options, seats, making)
            storages.give(context, made, undo)

        def keep() -> None:
            """Nothing is undone from here on: what is there is destroyed, here or by `reconcile`."""
            nonlocal kept
            kept = True
            if made is not None:
                storages.hold(context, made)
            making.undo.pop_all()
            undo.pop_all()

        entry = _prepare(context, entry, members, undo)
        form = report.snapshot_form(context, entry)
        try:
            hooks.before(form, context.io.lost)
            entry, warnings = taking.take(context, entry, members, freeze=options.freeze, keep=keep)
        except BaseException:
            hooks.after(form, taken=False)
            if kept and entry.id not in context.unsettled:
                destroy.try_destroy(context, entry)
            raise
        hooks.after(report.snapshot_form(context, entry), taken=True)
    try:
        _start_images(context, entry, members)
        entry = msgspec.structs.replace(entry, phase=Phase.ACTIVE)
        context.catalogue.put_snapshot(entry)
    except BaseException:
        destroy.try_destroy(context, entry)
        raise
    context.state.remove(naming.commit_name(entry.id))
    context.emit(
        "taken",
        snapshot=entry.id,
        device=naming.only_device(entry),
        devices=[image.filtered for image in entry.images],
        cursors=[naming.cursor(image) for image in entry.images],
    )
    return entry, [*(made.opened.notes if made is not None else ()), *warnings]


def _joined(context: Context, entry: SnapshotEntry, other_id: str, unit: int, undo: ExitStack) -> SnapshotEntry:
    """Puts the snapshot into the catalogue as one more that uses the storage of another, which then stays with it."""
    subject = f"--storage @{other_id}"
    known = context.catalogue.snapshot(other_id)
    if known is None:
        raise NotFound("no such snapshot", subject=subject, advice="`blksnap-ublk snapshot list` shows what is held")
    entry = msgspec.structs.replace(entry, storage_key=known.storage_key)
    with context.storage_locks.holding([entry.storage_key]):
        other = context.catalogue.snapshot(other_id)
        storage = context.catalogue.storage(entry.storage_key)
        if other is None or storage is None or other.phase is not Phase.ACTIVE:
            raise NotFound("it has been destroyed meanwhile", subject=subject)
        state, why = report.condition(context, other)
        if state is not SnapshotState.ACTIVE:
            raise Failed(f"that snapshot is {state.value} ({why})", subject=subject, advice="name storage of its own")
        if storage.unit != unit:
            text = f"its unit is {storage.unit} bytes, and that of the devices {unit}"
            raise UsageError(text, subject=subject, advice="name storage of its own")
        undo.callback(quietly, releasing.leave, context, entry)
        context.catalogue.put_snapshot(entry)
    return entry


def _prepare(context: Context, entry: SnapshotEntry, members: Sequence[DeviceEntry], undo: ExitStack) -> SnapshotEntry:
    """Reserves all that the instant and the time after it need, so that nothing can be lacking then."""
    undo.callback(context.state.remove, naming.commit_name(entry.id))
    os.close(context.state.create(naming.commit_name(entry.id), PAGE))
    exempted = sum(same_device.map_bytes(same_device.exempt_ranges(context, member.key)) for member in members)
    map_memory.ensure(context, at_least_one=True, needed=exempted)
    serials = context.catalogue.take_serials(len(members))
    disks = _add_disks(context, members, undo, partitions=entry.partitions)
    images = [
        ImageEntry(
            key=f"{entry.id}.{n}",
            device=member.key,
            filtered=naming.block_path(member),
            origin=member.origin,
            size=member.size,
            unit=member.unit,
            serial=serials[n],
            generation=str(context.histories[member.key].generation),
            change_number=context.histories[member.key].number + 1,
            served=disks[n],
        )
        for n, member in enumerate(members)
    ]
    entry = msgspec.structs.replace(entry, images=images)
    context.catalogue.put_snapshot(entry)
    for member, image in zip(members, images, strict=True):
        with _told_of(member):
            _open_image(context, entry, image, undo)
    return entry


def _add_disks(context: Context, members: Sequence[DeviceEntry], undo: ExitStack, *, partitions: bool) -> list[Served]:
    def add(member: DeviceEntry) -> Served:
        with _told_of(member):
            origin = blockdev.describe_number(DeviceNumber(*member.number))
            served = context.disks.add_image(origin, partitions=partitions)
            undo.callback(quietly, context.disks.delete, served.ublk_id)
            return served

    with _threads(members) as threads:
        return list(threads.map(add, members))


def _open_image(context: Context, entry: SnapshotEntry, image: ImageEntry, undo: ExitStack) -> None:
    name = naming.image_state_name(image)
    undo.callback(context.state.remove, name)
    state = context.state.create(name, image_state_bytes(image.size, image.unit))
    try:
        context.io.call(messages.OpenImage(image.key, image.device, entry.storage_key, image.serial), [state])
    finally:
        os.close(state)
    undo.callback(quietly, context.io.end, messages.Drop(image.key))
    same_device.exempt(context, image)
    history = context.histories[image.device]
    undo.callback(quietly, history.abort)
    history.prepare()


def _start_images(context: Context, entry: SnapshotEntry, members: Sequence[DeviceEntry]) -> None:
    def start(image: ImageEntry, member: DeviceEntry) -> None:
        with _told_of(member):
            assert image.served is not None
            context.disks.links.image(entry.id, member.name, image.origin, image.served.ublk_id)
            _start_image(context, image, image.served)

    with _threads(members) as threads:
        list(threads.map(start, entry.images, members))


def serve_image_message(key: str, served: Served) -> messages.ServeImage:
    """What the io process is told to serve an image."""
    return messages.ServeImage(
        image=key,
        ublk_id=served.ublk_id,
        depth=served.depth,
        desc_size=served.desc_size,
        flags=served.flags,
        zero_copy=served.zero_copy,
    )


def _start_image(context: Context, image: ImageEntry, served: Served) -> None:
    context.io.call(serve_image_message(image.key, served))
    context.disks.start(served.ublk_id, context.io.pid, context.io.lost)


def _threads(members: Sequence[DeviceEntry]) -> ThreadPoolExecutor:
    """Leaving it waits for all that was begun."""
    return ThreadPoolExecutor(min(len(members), _AT_ONCE), thread_name_prefix="image")


@contextmanager
def _errors() -> Iterator[None]:
    """What the reader of a message can make something of."""
    try:
        yield
    except HistoryError as error:
        raise Failed(str(error)) from None
    except IoRefused as error:
        raise Failed(error.strerror or str(error), errno=errno_symbol(error.errno)) from None
    except OSError as error:
        raise from_os_error(error, advice=_MORE_ROOM if error.errno in _NO_ROOM else None) from None


@contextmanager
def _told_of(member: DeviceEntry) -> Iterator[None]:
    """What fails here failed for this member, and the error says so."""
    path = naming.block_path(member)
    try:
        yield
    except BlksnapError as error:
        raise (error if path in error.message else type(error)(error.message, subject=path)) from None
    except HistoryError as error:
        raise Failed(str(error), subject=path) from None
    except IoRefused as error:
        raise Failed(error.strerror or str(error), subject=path, errno=errno_symbol(error.errno)) from None
    except OSError as error:
        advice = _MORE_ROOM if error.errno in _NO_ROOM else None
        raise from_os_error(error, subject=path, advice=advice) from None
