# SPDX-License-Identifier: MIT
"""A filtered device follows its origin, which has grown. Snapshots that are held keep their size.

The order, so that a death between any two steps is made good by `settle`:

    history: a bitmap for the new size is announced
    io process: goes on with it, what was marked is carried over, what the device has grown by is marked
    state: the swallowed trims of the new size take their name
    history, then catalogue: the new size
    kernel: the new size; only now somebody can write beyond the old one
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import ExitStack

import msgspec

from blksnap_ublk.cbt import History, HistoryError
from blksnap_ublk.errors import BlksnapError, Busy, Failed, NotFound, Unsupported, errno_symbol, from_os_error
from blksnap_ublk.host import blockdev
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import naming
from blksnap_ublk.snapshot.catalogue import DeviceEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.state_files import swallowed_bytes
from blksnap_ublk.ublk.features import Features

_log = logging.getLogger(__name__)


def resize(context: Context, device: DeviceEntry) -> tuple[DeviceEntry, int]:
    """Gives a filtered device the size that its origin has now; the device, and the bytes that it had before.

    Raises Failed where the origin is smaller than before, Unsupported where the kernel cannot do it, Busy while writes
    do not come to rest, NotFound. Nothing has changed then.
    """
    with context.locks.holding([device.key]):
        entry = context.catalogue.device(device.key)
        served = None if entry is None else entry.served
        if entry is None or served is None:
            raise NotFound("has been detached meanwhile", subject=device.origin)
        path = naming.block_path(entry)
        if entry.key in context.conditions:
            raise Busy("is being recovered", subject=path, errno="EBUSY", advice="try again in a moment")
        try:
            entry = settle(context, entry, known=True)
            before = blockdev.describe(path).size
            size = blockdev.describe_number(DeviceNumber(*entry.number)).size // entry.block * entry.block
            _refuse(entry, served.flags, before, size)
            if size > entry.size:
                entry = _grow(context, entry, size)
            tell_kernel(context, entry)
        except HistoryError as error:
            raise Failed(str(error), subject=path) from None
        except OSError as error:
            raise from_os_error(error, subject=path) from None
    if size > before:
        context.emit("resized", device=path, size=size, former_size=before)
    return entry, before


def settle(context: Context, entry: DeviceEntry, *, known: bool) -> DeviceEntry:
    """Ends a resize that was broken off by the death of a process; the device as it is then. Repeatable.

    `known`: an io process has the device; it may have gone on with the bitmap for the new size or not, and is told to
    do so once more. Where it has died, nobody knows which one holds the last marks: what has changed until now counts
    as all. Raises Busy, Failed, HistoryError, OSError.
    """
    history = context.histories.get(entry.key)
    if history is None:
        return entry
    if history.resizing is not None:
        if known:
            return _switch(context, entry, history, history.resizing.geometry.size, again=True)
        _log.error("%s: the io process died during a resize: everything counts as changed", entry.origin)
        # In this order: a swallowed trim that has been written over since must never be sent.
        os.close(context.state.create(_swallowed(entry), swallowed_bytes(entry.size, entry.tracking_block)))
        history.lose("resized")
        history.abandon_resize()
    if history.size > entry.size:
        entry = msgspec.structs.replace(entry, size=history.size)
        context.catalogue.put_device(entry)
    return entry


def settle_all(context: Context, devices: list[DeviceEntry], known: set[str]) -> list[DeviceEntry]:
    """`settle` for each; `known`: the keys of those that an io process has. Failures are logged, and tried again by
    the next resize, or by the next recovery.
    """
    found = []
    for device in devices:
        try:
            found.append(settle(context, device, known=device.key in known))
        except (BlksnapError, HistoryError, OSError) as error:
            _log.error("%s: a resize that was broken off: %s", device.origin, error)
            found.append(device)
    return found


def tell_kernel(context: Context, entry: DeviceEntry) -> None:
    """Lets the disk of a device that is served have the size of the device. Raises OSError, NotFound."""
    if entry.served is None or Features.UPDATE_SIZE not in Features(entry.served.flags):
        return
    size = entry.size // entry.block * entry.block
    if blockdev.describe(naming.block_path(entry)).size < size:
        context.disks.resize(entry.served.ublk_id, size)


def _refuse(entry: DeviceEntry, flags: int, before: int, size: int) -> None:
    """Raises Failed, Unsupported."""
    path = naming.block_path(entry)
    if size < entry.size // entry.block * entry.block:
        text = f"its origin {entry.origin} has {size} bytes now, fewer than the {before} of {path}: it cannot shrink"
        raise Failed(text, subject=path, advice="give the origin its former size back, or detach it")
    if size > before and Features.UPDATE_SIZE not in Features(flags):
        text = "this kernel cannot resize a ublk device (it needs Linux 6.16)"
        raise Unsupported(text, subject=path, advice="detach it and attach it again")


def _grow(context: Context, entry: DeviceEntry, size: int) -> DeviceEntry:
    history = context.histories.get(entry.key)
    if history is None:
        raise NotFound("has been detached meanwhile", subject=entry.origin)
    return _switch(context, entry, history, size, again=False)


def _switch(context: Context, entry: DeviceEntry, history: History, size: int, *, again: bool) -> DeviceEntry:
    """`again`: the io process may have done its part before."""
    path = naming.block_path(entry)
    following = f"{_swallowed(entry)}.next"
    try:
        bitmap = history.begin_resize(size)
        os.close(context.state.create(following, swallowed_bytes(size, entry.tracking_block)))
        _go_on_with(context, entry.key, size, str(bitmap.path), following)
    except (IoRefused, OSError) as error:
        if not again:  # nobody knows of the new files
            history.abandon_resize()
            context.state.remove(following)
        if isinstance(error, IoRefused):
            raise _refusal(entry, error) from None
        advice = "destroy snapshots, or restart the daemon with a larger --state-size"
        raise from_os_error(error, subject=path, advice=advice) from None
    os.rename(context.state.path(following), context.state.path(_swallowed(entry)))
    history.end_resize()
    entry = msgspec.structs.replace(entry, size=size)
    context.catalogue.put_device(entry)
    return entry


def _go_on_with(context: Context, key: str, size: int, bitmap: str, swallowed: str) -> None:
    """Lets the io process go on with other files. Raises IoRefused, Failed, OSError."""
    with ExitStack() as closing:
        marks = os.open(bitmap, os.O_RDWR | os.O_CLOEXEC)
        closing.callback(os.close, marks)
        trims = context.state.open(swallowed)
        closing.callback(os.close, trims)
        context.io.call(messages.ResizeDevice(key, size), [marks, trims])


def _refusal(entry: DeviceEntry, error: IoRefused) -> BlksnapError:
    path = naming.block_path(entry)
    text = error.strerror or str(error)
    if error.errno in (errno.EBUSY, errno.ETIMEDOUT):
        return Busy(f"its writes did not come to rest: {text}", subject=path, errno="EBUSY", advice="try again")
    return Failed(text, subject=path, errno=errno_symbol(error.errno))


def _swallowed(entry: DeviceEntry) -> str:
    return f"device-{entry.key}/swallowed"
