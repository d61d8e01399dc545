# SPDX-License-Identifier: MIT
"""Attach: from an origin to its filtered device."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from blksnap_ublk.errors import Busy, Unsupported, UsageError, from_os_error
from blksnap_ublk.host import blockdev, claim, holders, pagecache, stack
from blksnap_ublk.host.blockdev import BlockDevice
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import buffers, naming, same_device, saved_changes
from blksnap_ublk.snapshot.catalogue import DeviceEntry, Phase, Served
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.saved_changes import Recall
from blksnap_ublk.snapshot.state_files import swallowed_bytes
from blksnap_ublk.snapshot.undoing import quietly

MAX_DEPTH = 4096
MAX_QUEUES = 64
DEFAULT_DEPTH = 128
DEFAULT_TRACKING_BLOCK = 64 << 10
DEFAULT_UNIT = 4 << 10
TRACKING_BLOCKS = (4 << 10, 64 << 20)
UNITS = (512, 64 << 10)

# They open devices for a moment, to read; and systemd holds what the keeper gives it to keep.
_HARMLESS = ("systemd-udevd", "(udev-worker)", "systemd")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+-]{0,63}")
# Directories below /dev/blksnap: that of the origins, and one for each snapshot.
_TAKEN_NAME = re.compile(r"origins|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class AttachOptions:
    """What a user may choose; None is the default. Sizes in bytes. Raises UsageError for what cannot be."""

    name: str | None = None
    queues: int | None = None
    depth: int | None = None
    tracking_block: int | None = None
    unit: int | None = None
    trust_offline: bool = False

    def __post_init__(self) -> None:
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise UsageError("a name has up to 64 letters, digits, and _ . : + -", subject=f"--name {self.name!r}")
        if self.name is not None and _TAKEN_NAME.fullmatch(self.name):
            raise UsageError("is the name of a directory in /dev/blksnap", subject=f"--name {self.name}")
        _within("--queues", self.queues, 1, MAX_QUEUES)
        _within("--depth", self.depth, 1, MAX_DEPTH)
        _power("--tracking-block", self.tracking_block, *TRACKING_BLOCKS)
        _power("--unit", self.unit, *UNITS)


def attach(context: Context, path: str, options: AttachOptions) -> tuple[DeviceEntry, list[str]]:
    """Serves the filtered device of the origin at `path`; the device, and warnings.

    Raises Busy, Unsupported, UsageError, NotFound or Failed, and then leaves nothing behind.
    """
    origin = blockdev.describe(path)
    refuse_origin(origin)
    same_device.refuse_origin_of_storage(context, origin.number, origin.path)
    key = secrets.token_hex(4)
    with context.locks.holding([key]), ExitStack() as undo:
        entry = _reserve(context, key, origin, options, undo)
        descriptor = claim.open_exclusive(origin.path)
        undo.callback(quietly, context.disks.links.origin_released, origin.number)
        try:
            undo.callback(quietly, context.keeper.drop, naming.origin_descriptor_name(key))
            context.keeper.put(naming.origin_descriptor_name(key), descriptor)
            pagecache.flush_disk(origin.number)
            warnings = _other_openers(origin)
            trust = options.trust_offline
            wanted = saved_changes.Wanted(options.tracking_block, entry.unit, trust, in_use=bool(warnings))
            recalled = saved_changes.recall(context, origin, descriptor, wanted)
            entry, unknown = _create_state(context, entry, recalled, undo)
            warnings += unknown

            def begin_writes() -> None:
                warnings.extend(saved_changes.mark_in_use(recalled, context.histories[key].generation))

            entry = _serve(context, entry, origin, descriptor, options, undo, begin_writes)
        except OSError as error:
            raise from_os_error(error, subject=origin.path) from None
        finally:
            os.close(descriptor)
        entry = msgspec.structs.replace(entry, phase=Phase.ACTIVE)
        context.catalogue.put_device(entry)
        undo.pop_all()
    context.emit("attached", device=naming.block_path(entry), origin=entry.origin, name=entry.name)
    return entry, warnings


def refuse_origin(origin: BlockDevice) -> None:
    """Raises Unsupported or UsageError for a block device that cannot be an origin."""
    if origin.size == 0:
        raise UsageError("has no size; is there a medium?", subject=origin.path)
    if origin.limits.zoned != "none":
        raise Unsupported(f"is a {origin.limits.zoned} zoned device, which cannot be filtered", subject=origin.path)
    page = os.sysconf("SC_PAGE_SIZE")
    if origin.limits.logical_block > page:
        text = f"has logical blocks of {origin.limits.logical_block} bytes, larger than a page ({page})"
        raise Unsupported(text, subject=origin.path)
    if origin.read_only:
        raise Unsupported("is read-only: nothing can change on it", subject=origin.path, advice="snapshot is pointless")


def _reserve(context: Context, key: str, origin: BlockDevice, options: AttachOptions, undo: ExitStack) -> DeviceEntry:
    """Puts the device into the catalogue, unless its origin or its name is taken."""
    name = options.name or os.path.basename(origin.path)
    unit = options.unit or max(DEFAULT_UNIT, origin.limits.logical_block)
    tracking_block = options.tracking_block or max(DEFAULT_TRACKING_BLOCK, unit)
    if unit < origin.limits.logical_block:
        text = f"is smaller than the logical block of {origin.path}, {origin.limits.logical_block} bytes"
        raise UsageError(text, subject=f"--unit {unit}")
    if tracking_block < unit:
        raise UsageError(f"is smaller than the unit of {unit} bytes", subject=f"--tracking-block {tracking_block}")
    entry = DeviceEntry(
        key=key,
        name=name,
        origin=origin.path,
        number=(origin.number.major, origin.number.minor),
        size=origin.size,
        block=origin.limits.logical_block,
        unit=unit,
        tracking_block=tracking_block,
        phase=Phase.CREATING,
    )
    with context.locks.devices:
        beneath = stack.underlying_devices(origin.number) | {origin.number, origin.disk}
        for other in context.catalogue.devices():
            if DeviceNumber(*other.number) in beneath:
                where = naming.block_path(other) if other.served else "another attach that is under way"
                raise Busy(f"is attached already, as {where}", subject=origin.path, errno="EBUSY")
            if other.name == name:
                advice = "choose another with --name"
                raise Busy(f"the name {name!r} is taken by {other.origin}", subject=origin.path, advice=advice)
        _refuse_own(context, beneath, origin)
        undo.callback(context.catalogue.remove_device, key)
        context.catalogue.put_device(entry)
    return entry


def _refuse_own(context: Context, beneath: frozenset[DeviceNumber], origin: BlockDevice) -> None:
    ours = {entry.served.ublk_id for entry in context.catalogue.devices() if entry.served is not None}
    ours |= {image.served.ublk_id for entry in context.catalogue.snapshots() for image in entry.images if image.served}
    for number in beneath:
        ublk_id = blockdev.describe_number(number).ublk_id
        if ublk_id in ours:
            text = f"lies on /dev/ublkb{ublk_id}, which is a filtered device or an image"
            raise Unsupported(text, subject=origin.path, advice="attach the device beneath it instead")


def _other_openers(origin: BlockDevice) -> list[str]:
    found = holders.openers(origin.number, ignore=[os.getpid(), os.getppid()])
    return [
        f"{opener} has {opener.node} open; what it writes there passes the filter by: end it, or let it use the "
        "filtered device"
        for opener in found
        if opener.command not in _HARMLESS
    ]


def _create_state(
    context: Context, entry: DeviceEntry, recalled: Recall, undo: ExitStack
) -> tuple[DeviceEntry, list[str]]:
    """Its history, the one that was saved where that still holds; the entry with its tracking block, and warnings."""
    if recalled.tracking_block is not None and recalled.tracking_block != entry.tracking_block:
        entry = msgspec.structs.replace(entry, tracking_block=recalled.tracking_block)
        context.catalogue.put_device(entry)
    directory = f"device-{entry.key}"
    undo.callback(context.state.remove, directory)
    context.state.path(directory).mkdir(mode=0o700)
    try:
        history, unknown = saved_changes.begin(
            recalled, context.state.path(directory), entry.size, entry.tracking_block
        )
    except OSError as error:
        where = str(context.state.path(directory))
        raise from_os_error(error, subject=where, advice="restart the daemon with more --state-size") from None
    except ValueError as error:
        raise UsageError(str(error), subject=entry.origin) from None
    undo.callback(context.histories.pop, entry.key, None)
    context.histories[entry.key] = history
    os.close(context.state.create(f"{directory}/swallowed", swallowed_bytes(entry.size, entry.tracking_block)))
    return entry, [f"{entry.origin}: {unknown}"] if unknown is not None else []


def open_at_io(context: Context, entry: DeviceEntry, origin: int) -> None:
    """Makes the device known to the io process. Raises IoRefused, Failed, FileNotFoundError."""
    with ExitStack() as closing:
        bitmap = os.open(context.histories[entry.key].active.path, os.O_RDWR | os.O_CLOEXEC)
        closing.callback(os.close, bitmap)
        swallowed = context.state.open(f"device-{entry.key}/swallowed")
        closing.callback(os.close, swallowed)
        message = messages.OpenDevice(
            device=entry.key,
            size=entry.size,
            block=entry.block,
            unit=entry.unit,
            tracking_block=entry.tracking_block,
            held=naming.origin_descriptor_name(entry.key),
        )
        context.io.call(message, [origin, bitmap, swallowed])


def serve_message(key: str, served: Served) -> messages.ServeDevice:
    """What the io process is told to serve a device."""
    return messages.ServeDevice(
        device=key,
        ublk_id=served.ublk_id,
        queues=served.queues,
        depth=served.depth,
        desc_size=served.desc_size,
        flags=served.flags,
        zero_copy=served.zero_copy,
    )


def _serve(
    context: Context,
    entry: DeviceEntry,
    origin: BlockDevice,
    descriptor: int,
    options: AttachOptions,
    undo: ExitStack,
    begin_writes: Callable[[], None],
) -> DeviceEntry:
    queues = options.queues or min(os.cpu_count() or 1, 4)
    served = context.disks.add_filtered(entry.key, origin, queues, options.depth or DEFAULT_DEPTH)
    undo.callback(quietly, context.disks.delete, served.ublk_id)
    entry = msgspec.structs.replace(entry, served=served)
    context.catalogue.put_device(entry)
    context.disks.links.filtered(entry)
    open_at_io(context, entry, descriptor)
    undo.callback(quietly, context.io.end, messages.CloseDevice(entry.key))
    buffers.serve(context, serve_message(entry.key, served))
    undo.callback(quietly, context.disks.stop, served.ublk_id)
    begin_writes()
    context.disks.start(served.ublk_id, context.io.pid, context.io.lost)
    context.disks.links.origin_taken(origin.number)
    return entry


def _within(option: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise UsageError(f"{value} is not between {least} and {most}", subject=option)


def _power(option: str, value: int | None, least: int, most: int) -> None:
    if value is not None and (not least <= value <= most or value & (value - 1)):
        raise UsageError(f"{value} is not a power of two between {least} and {most} bytes", subject=option)
