# SPDX-License-Identifier: MIT
"""Taking a snapshot: everything is reserved first, then one instant for all devices, then the images are started."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from blksnap_ublk.cbt import HistoryError
from blksnap_ublk.errors import BlksnapError, Busy, Failed, Unsupported, UsageError, errno_symbol, from_os_error
from blksnap_ublk.forms import DeviceState, Freeze, timestamp
from blksnap_ublk.host import blockdev
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import map_memory, naming, storages
from blksnap_ublk.snapshot.catalogue import DeviceEntry, ImageEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.freeze import Freezer, mounted_on
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.state_files import PAGE, image_state_bytes
from blksnap_ublk.snapshot.storage import OpenAreas
from blksnap_ublk.snapshot.undoing import quietly

GATE_LIMIT_MS = 2000


@dataclass(frozen=True)
class CreateOptions:
    """What a user asks for. `limit` in bytes. Raises UsageError, or Unsupported for what is not possible yet."""

    specs: Sequence[Spec]
    limit: int | None = None
    on_overflow: str = "break"
    freeze: Freeze = Freeze.TRY

    def __post_init__(self) -> None:
        if not self.specs:
            raise UsageError("no difference storage is named", advice="give --storage or --storage-file")
        if self.limit is not None and self.limit <= 0:
            raise UsageError(f"{self.limit} is not a positive number of bytes", subject="--limit")
        if self.on_overflow != "break":
            raise Unsupported("not supported yet, only `break` is", subject=f"--on-overflow {self.on_overflow}")


def create(context: Context, devices: Sequence[DeviceEntry], options: CreateOptions) -> tuple[SnapshotEntry, list[str]]:
    """One snapshot of all `devices` at one instant; the snapshot, and warnings. Its images exist on return.

    Raises Busy, Unsupported, UsageError or Failed; then nothing has changed, but that a change number may be used up.
    """
    with context.locks.holding(device.key for device in devices):
        members = [_present(context, device) for device in devices]
        _refuse_unsupported(context, members)
        try:
            return _create(context, members, options)
        except HistoryError as error:
            raise Failed(str(error)) from None
        except IoRefused as error:
            raise _refusal(members, error) from None
        except OSError as error:
            raise from_os_error(error) from None


def _present(context: Context, device: DeviceEntry) -> DeviceEntry:
    """The device as it is now that it is locked."""
    entry = context.catalogue.device(device.key)
    if entry is None or entry.phase is not Phase.ACTIVE or entry.served is None:
        raise Failed("has been detached meanwhile", subject=device.origin)
    if context.conditions.get(entry.key, DeviceState.LIVE) is not DeviceState.LIVE:
        raise Busy("is being recovered", subject=naming.block_path(entry), errno="EBUSY", advice="try again soon")
    return entry


def _refuse_unsupported(context: Context, members: Sequence[DeviceEntry]) -> None:
    if not members:
        raise UsageError("no device is named")
    if len({member.key for member in members}) < len(members):
        raise UsageError("a device is named twice")
    if len(members) > 1:
        raise Unsupported("a snapshot of several devices is not supported yet", advice="take one of each device")
    for member in members:
        for held in naming.snapshots_of(context.catalogue, member.key):
            text = f"has the snapshot {held.id}, and a second one at the same time is not supported yet"
            raise Unsupported(text, subject=naming.block_path(member), advice="destroy that one first")


def _create(
    context: Context, members: Sequence[DeviceEntry], options: CreateOptions
) -> tuple[SnapshotEntry, list[str]]:
    snapshot_id = str(uuid.uuid4())
    unit = max(member.unit for member in members)
    with ExitStack() as undo:
        former = storages.former_sizes(options.specs)
        entry = SnapshotEntry(
            id=snapshot_id,
            created=timestamp(time.time()),
            phase=Phase.CREATING,
            frozen=False,
            gate_us=0,
            images=[],
            storage=storages.announce(snapshot_id, options.specs, former, unit=unit, limit=options.limit),
            members=[member.key for member in members],
        )
        undo.callback(context.catalogue.remove_snapshot, snapshot_id)
        context.catalogue.put_snapshot(entry)
        opened = storages.open_areas(
            context, options.specs, limit=options.limit, needed=sum(member.size for member in members), unit=unit
        )
        undo.callback(opened.undo)
        storage = storages.describe(snapshot_id, opened, former, unit=unit, limit=options.limit)
        entry = msgspec.structs.replace(entry, storage=storage)
        context.catalogue.put_snapshot(entry)
        entry = _prepare(context, entry, members, opened, undo)
        entry, warnings = _take(context, entry, members, opened, options.freeze, undo)
        for image in entry.images:
            _start_image(context, image, undo)
        entry = msgspec.structs.replace(entry, phase=Phase.ACTIVE)
        context.catalogue.put_snapshot(entry)
        storages.hold(context, opened)
        undo.pop_all()
    context.state.remove(commit_name(snapshot_id))
    context.emit(
        "taken", snapshot=entry.id, device=entry.images[0].filtered, cursors=[cursor(image) for image in entry.images]
    )
    return entry, [*opened.notes, *warnings]


def cursor(image: ImageEntry) -> str:
    """What a backup of the image remembers."""
    return f"{image.generation}:{image.change_number}"


def image_state_name(image: ImageEntry) -> str:
    """The state file of an image."""
    return f"image-{image.key}"


def commit_name(snapshot_id: str) -> str:
    """The file whose first word says that the instant was taken."""
    return f"commit-{snapshot_id}"


def _prepare(
    context: Context, entry: SnapshotEntry, members: Sequence[DeviceEntry], opened: OpenAreas, undo: ExitStack
) -> SnapshotEntry:
    """Reserves all that the instant and the time after it need, so that nothing can be lacking then."""
    undo.callback(context.state.remove, commit_name(entry.id))
    os.close(context.state.create(commit_name(entry.id), PAGE))
    storages.give(context, entry.storage, opened, undo)
    map_memory.ensure(context, at_least_one=True)
    images = []
    for n, member in enumerate(members):
        origin = blockdev.describe_number(DeviceNumber(*member.number))
        served = context.disks.add_image(origin)
        undo.callback(quietly, context.disks.delete, served.ublk_id)
        history = context.histories[member.key]
        image = ImageEntry(
            key=f"{entry.id}.{n}",
            device=member.key,
            filtered=naming.block_path(member),
            origin=member.origin,
            size=member.size,
            unit=member.unit,
            serial=context.catalogue.next_serial() + n,
            generation=str(history.generation),
            change_number=history.number + 1,
            served=served,
        )
        images.append(image)
        entry = msgspec.structs.replace(entry, images=images)
        context.catalogue.put_snapshot(entry)
        undo.callback(context.state.remove, image_state_name(image))
        state = context.state.create(image_state_name(image), image_state_bytes(image.size, image.unit))
        try:
            context.io.call(messages.OpenImage(image.key, member.key, entry.storage.key, image.serial), [state])
        finally:
            os.close(state)
        undo.callback(quietly, context.io.end, messages.Drop(image.key))
        undo.callback(quietly, history.abort)
        history.prepare()
    return entry


def _take(
    context: Context,
    entry: SnapshotEntry,
    members: Sequence[DeviceEntry],
    opened: OpenAreas,
    freeze: Freeze,
    undo: ExitStack,
) -> tuple[SnapshotEntry, list[str]]:
    """The instant. Afterwards the change numbers are used, whatever happens to the snapshot."""
    nodes = [os.stat(naming.block_path(member)).st_rdev for member in members]
    mounted = [] if freeze is Freeze.NO else mounted_on(DeviceNumber.of(node) for node in nodes)
    with Freezer(mounted, context.io.lost) as freezer, ExitStack() as closing:
        bitmaps = []
        for member in members:
            prepared = context.histories[member.key].prepared
            assert prepared is not None
            bitmaps.append(os.open(prepared.path, os.O_RDWR | os.O_CLOEXEC))
            closing.callback(os.close, bitmaps[-1])
        commit = context.state.open(commit_name(entry.id))
        closing.callback(os.close, commit)
        message = messages.Take(
            [messages.Member(image.device, image.key) for image in entry.images], limit_ms=GATE_LIMIT_MS
        )
        frozen = freezer.freeze()
        if not frozen and freeze is Freeze.REQUIRE:
            freezer.thaw()
            raise Unsupported("; ".join(freezer.warnings), advice="unmount it, or leave out --require-freeze")
        taken_at = time.time()
        try:
            done = context.io.call(message, [*bitmaps, commit])
        except Failed:
            # Whether it was taken can be said only when the io process is back.
            _leave_to_reconcile(context, opened, undo)
            raise
        finally:
            in_time = freezer.thaw()
    try:
        for image in entry.images:
            context.histories[image.device].commit(image.change_number)
    except (OSError, HistoryError):
        # Writes are marked in the prepared bitmap by now: it must stay.
        _leave_to_reconcile(context, opened, undo)
        raise
    for image in entry.images:
        undo.callback(quietly, context.histories[image.device].destroy, image.change_number)
    if not in_time:
        frozen = False
        freezer.warnings.append("file systems had to be thawed before the snapshot was taken; it is as after a crash")
        if freeze is Freeze.REQUIRE:
            raise Failed("the file systems had to be thawed before the snapshot was taken", advice="try again")
    entry = msgspec.structs.replace(
        entry, created=timestamp(taken_at), frozen=frozen and freeze is not Freeze.NO, gate_us=done.gate_us
    )
    context.catalogue.put_snapshot(entry)
    return entry, freezer.warnings


def _leave_to_reconcile(context: Context, opened: OpenAreas, undo: ExitStack) -> None:
    """Nothing is undone now: `reconcile` finds out from the commit file whether the instant came, and cleans up."""
    storages.hold(context, opened)
    undo.pop_all()


def _start_image(context: Context, image: ImageEntry, undo: ExitStack) -> None:
    served = image.served
    assert served is not None
    message = messages.ServeImage(
        image=image.key,
        ublk_id=served.ublk_id,
        depth=served.depth,
        desc_size=served.desc_size,
        flags=served.flags,
        zero_copy=served.zero_copy,
    )
    context.io.call(message)
    undo.callback(quietly, context.io.end, messages.FinishImage(image.key))
    undo.callback(quietly, context.disks.stop, served.ublk_id)
    context.disks.start(served.ublk_id, context.io.pid)


def _refusal(members: Sequence[DeviceEntry], error: IoRefused) -> BlksnapError:
    late = next((member for member in members if member.key == error.member), None)
    if late is not None:
        text = f"writes did not come to rest within {GATE_LIMIT_MS / 1000:g} s"
        advice = "is the origin slow or stuck? try again"
        return Busy(text, subject=naming.block_path(late), errno="ETIMEDOUT", advice=advice)
    return Failed(error.strerror or str(error), errno=errno_symbol(error.errno))
