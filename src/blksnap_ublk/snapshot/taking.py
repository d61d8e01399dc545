# SPDX-License-Identifier: MIT
"""The instant of a snapshot, for all its members: frozen, switched by the io process, thawed."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from blksnap_ublk.errors import BlksnapError, Busy, Failed, Unsupported, errno_symbol
from blksnap_ublk.forms import Freeze, timestamp
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import naming, storages
from blksnap_ublk.snapshot.catalogue import DeviceEntry, SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.freeze import Freezer, mounted_on
from blksnap_ublk.snapshot.freeze_order import FileSystem

GATE_LIMIT_MS = 2000
_ROOM_LIMIT = 5.0  # seconds that writes which wait for room in a storage are waited for, nothing being frozen yet
_COMMIT = {struct.pack("<I", 0): False, struct.pack("<I", 1): True}
_GROWTH_LIMIT = 2.0  # seconds that a file which is being made longer is waited for


def take(
    context: Context, entry: SnapshotEntry, members: Sequence[DeviceEntry], *, freeze: Freeze, keep: Callable[[], None]
) -> tuple[SnapshotEntry, list[str]]:
    """The instant; the entry with what it brought, and warnings. Afterwards the change numbers are used, come what may.

    The members stand in the order of the entry's images. No order among them is needed: none is stacked on another,
    attach refuses that. Raises Busy naming a member whose writes do not end in time, Unsupported where freezing is
    required and not possible, Failed, HistoryError, OSError; nothing is switched or left frozen then, except where
    `keep` was called.

    `keep` is called when the instant has come, or may have: from then on the snapshot is to be destroyed like any
    other, because the io process may write to its storage. One in `Context.unsettled` is for `reconcile` to destroy.
    """
    _wait_for_room(context, members)
    systems = [] if freeze is Freeze.NO else _file_systems(context, members)
    with Freezer(systems, context.io.lost) as freezer, ExitStack() as closing, _nothing_grows(context):
        descriptors = _descriptors(context, entry, closing)
        message = messages.Take(
            [messages.Member(image.device, image.key) for image in entry.images], limit_ms=GATE_LIMIT_MS
        )
        frozen = freezer.freeze()
        if not frozen and freeze is Freeze.REQUIRE:
            freezer.thaw()
            raise Unsupported("; ".join(freezer.warnings), advice="unmount it, or leave out --require-freeze")
        taken_at = time.time()
        try:
            done = context.io.call(message, descriptors)
        except IoRefused as error:
            raise _refusal(members, error) from None
        except Failed:
            context.unsettled.add(entry.id)
            keep()
            raise
        finally:
            in_time = freezer.thaw()
    context.unsettled.add(entry.id)
    keep()
    settle(context, entry)
    context.unsettled.discard(entry.id)
    if not in_time:
        frozen = False
        freezer.warnings.append("file systems had to be thawed before the snapshot was taken; it is as after a crash")
        if freeze is Freeze.REQUIRE:
            raise Failed("the file systems had to be thawed before the snapshot was taken", advice="try again")
    entry = msgspec.structs.replace(
        entry,
        created=timestamp(taken_at),
        frozen=frozen and freeze is not Freeze.NO,
        gate_us=done.gate_us,
        gate_writes_us=done.gate_writes_us,
        expires=None if entry.ttl is None else taken_at + entry.ttl,
    )
    context.catalogue.put_snapshot(entry)
    return entry, freezer.warnings


def _wait_for_room(context: Context, members: Sequence[DeviceEntry]) -> None:
    """Writes that wait for room keep a device from coming to rest; in the end the io process refuses the take."""
    keys = {held.storage_key for each in members for held in naming.snapshots_of(context.catalogue, each.key)}
    end = time.monotonic() + _ROOM_LIMIT
    while time.monotonic() < end:
        states = [context.state.storage_state(naming.storage_state_name(key)) for key in keys]
        if not any(state.waiting for state in states if state is not None):
            return
        time.sleep(0.02)


@contextmanager
def _nothing_grows(context: Context) -> Iterator[None]:
    """While file systems are frozen no file of a storage is made longer; one that takes too long is not waited for."""
    held = context.growing.acquire(_GROWTH_LIMIT)
    try:
        yield
    finally:
        if held:
            context.growing.release()


def settle(context: Context, snapshot: SnapshotEntry) -> None:
    """Tells the histories whether the instant of a snapshot came: forward if it did, back if not. Repeatable.

    Until then no other snapshot of its devices may be taken: their writes may be marked in the prepared bitmaps
    already. Raises OSError, HistoryError.
    """
    taken = instant_came(context, snapshot)
    if taken is None:
        return
    for image in snapshot.images:
        history = context.histories.get(image.device)
        if history is None or history.prepared is None or history.number + 1 != image.change_number:
            continue
        if taken:
            history.commit(image.change_number)
        else:
            history.abort()


def instant_came(context: Context, snapshot: SnapshotEntry) -> bool | None:
    """What the commit file of a snapshot says; None where it has none: before all, and once its images exist.

    Raises OSError, EBADMSG for one that says neither.
    """
    try:
        descriptor = context.state.open(naming.commit_name(snapshot.id))
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        word = file.read(4)
    if word not in _COMMIT:
        raise OSError(errno.EBADMSG, "its commit file is damaged")
    return _COMMIT[word]


def _file_systems(context: Context, members: Sequence[DeviceEntry]) -> list[FileSystem]:
    """What is mounted from the members, in the order of freezing."""
    origins = {}
    for device in naming.served_devices(context.catalogue):
        with suppress(OSError):  # detached meanwhile
            origins[_number(device)] = DeviceNumber(*device.number)
    return mounted_on(map(_number, members), storages.file_systems(context), origins=origins)


def _number(device: DeviceEntry) -> DeviceNumber:
    return DeviceNumber.of(os.stat(naming.block_path(device)).st_rdev)


def _descriptors(context: Context, entry: SnapshotEntry, closing: ExitStack) -> list[int]:
    """The next bitmap of each member, and the commit file."""
    found = []
    for image in entry.images:
        prepared = context.histories[image.device].prepared
        assert prepared is not None
        found.append(os.open(prepared.path, os.O_RDWR | os.O_CLOEXEC))
        closing.callback(os.close, found[-1])
    found.append(context.state.open(naming.commit_name(entry.id)))
    closing.callback(os.close, found[-1])
    return found


def _refusal(members: Sequence[DeviceEntry], error: IoRefused) -> BlksnapError:
    late = next((member for member in members if member.key == error.member), None)
    if late is not None and error.errno == errno.EBUSY:
        text = "writers wait for room in the difference storage of a snapshot of it"
        advice = "`storage add` or `storage limit` gives it room, or destroy that snapshot"
        return Busy(text, subject=naming.block_path(late), errno="EBUSY", advice=advice)
    if late is not None:
        text = f"writes did not come to rest within {GATE_LIMIT_MS / 1000:g} s"
        advice = "is the origin slow or stuck? try again"
        return Busy(text, subject=naming.block_path(late), errno="ETIMEDOUT", advice=advice)
    return Failed(error.strerror or str(error), errno=errno_symbol(error.errno))
