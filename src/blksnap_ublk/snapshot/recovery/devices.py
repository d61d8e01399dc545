# SPDX-License-Identifier: MIT
"""Devices whose io process has died: made known to the one of now, then served again."""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from blksnap_ublk.cbt import HistoryError
from blksnap_ublk.errors import BlksnapError, Failed
from blksnap_ublk.forms import DeviceState
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import attach, buffers, naming
from blksnap_ublk.snapshot.catalogue import DeviceEntry, Phase
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.recovery import histories
from blksnap_ublk.snapshot.storage.reopening import reclaim
from blksnap_ublk.ublk.device_info import DeviceState as KernelState

PATIENCE = 5.0
"""Seconds for the last I/O of a dead io process, before a device is tried again from time to time."""

_FAILURES = (BlksnapError, OSError, HistoryError, ValueError, struct.error)
_AT_ONCE = 16  # devices that are recovered at the same time
_log = logging.getLogger(__name__)


def open_all(context: Context, devices: list[DeviceEntry], inventory: messages.Inventory) -> None:
    """Makes those that the io process does not know known to it; a failure is left to `serve`."""
    known = {report.device for report in inventory.devices}
    lacking = [device for device in devices if device.key not in known]
    for device in lacking:
        if context.conditions.setdefault(device.key, DeviceState.RECOVERING) is DeviceState.RECOVERING:
            _log.warning("%s: its io process is gone; recovering", naming.block_path(device))
    _at_once(lambda device: _open(context, device, PATIENCE), lacking)


def serve_all(context: Context, devices: list[DeviceEntry], patience: float = PATIENCE) -> None:
    """Lets the io process serve those that it does not serve: one whose origin does not answer keeps none waiting.

    The last I/O of a dead one is waited for `patience` seconds. Raises Failed when the io process has gone.
    """
    reports = {report.device: report for report in context.io.inventory().devices}
    _at_once(lambda device: _serve(context, device, reports.get(device.key), patience), devices)


def try_again(context: Context) -> None:
    """Once more for those that could not be served, for instance because their origin did not answer."""
    for key in list(context.conditions):
        with context.locks.trying([key]) as held:
            device = context.catalogue.device(key) if held else None
            if device is not None and device.phase is Phase.ACTIVE and key in context.conditions:
                serve_all(context, [device], patience=0)


def _serve(context: Context, device: DeviceEntry, report: messages.DeviceReport | None, patience: float) -> None:
    path = naming.block_path(device)
    before = context.conditions.get(device.key)
    try:
        if _is_served(context, device, report):
            context.conditions.pop(device.key, None)
            return
        context.conditions.setdefault(device.key, DeviceState.RECOVERING)
        if report is None and not _open(context, device, patience, quiet=False):
            return
        _recover(context, device, report is not None and report.serving, patience)
    except TimeoutError as error:
        if patience:
            _log.warning("%s: waits, and is tried again: %s", path, error)
        return
    except _FAILURES as error:
        if context.io.lost():
            return
        context.conditions[device.key] = DeviceState.FAILED
        if before is not DeviceState.FAILED:
            _log.error("%s: cannot be served again, will be tried from time to time: %s", path, error)
            context.emit("failed", device=path, error=str(error))
        return
    context.conditions.pop(device.key, None)
    pause = None if context.io_died is None else round((time.monotonic() - context.io_died) * 1000)
    context.emit("recovered", device=path, pause_ms=pause)


def _is_served(context: Context, device: DeviceEntry, report: messages.DeviceReport | None) -> bool:
    if report is None or not report.serving or device.served is None:
        return False
    # A control process may have died before it told the kernel.
    return context.disks.state_of(device.served) is not KernelState.QUIESCED


def _recover(context: Context, device: DeviceEntry, armed: bool, patience: float) -> None:
    served = device.served
    assert served is not None
    if context.disks.state_of(served) in (None, KernelState.DEAD):
        raise Failed("its disk was removed by somebody else", advice="detach it")
    if not armed:
        context.disks.begin_recovery(served.ublk_id, patience)
        buffers.serve(context, attach.serve_message(device.key, served))
    context.disks.end_recovery(served.ublk_id, context.io.pid)


def _open(context: Context, device: DeviceEntry, patience: float, *, quiet: bool = True) -> bool:
    """With `quiet` failures are only logged. Raises as its steps do."""
    try:
        origin = _claimed_origin(context, device, patience)
        try:
            _open_at_io(context, device, origin)
        finally:
            os.close(origin)
    except _FAILURES as error:
        if not quiet:
            raise
        _log.error("%s: cannot be opened again: %s", device.origin, error)
        return False
    return True


def _open_at_io(context: Context, device: DeviceEntry, origin: int) -> None:
    """No state of it, whatever has become of that, keeps an origin from being served. Raises as its steps do."""
    try:
        if device.key not in context.histories:
            raise HistoryError("there is no change history")
        if context.histories[device.key].size != device.size:
            raise HistoryError("the change history is that of a device of another size")
        histories.ensure_swallowed(context, device)
        attach.open_at_io(context, device, origin)
    except (HistoryError, OSError) as error:
        if not _tells_of_damage(error):
            raise  # it passes, and is no reason to forget all changes
        _log.error("%s: its state cannot be used: %s", device.origin, error)
        histories.begin_again(context, device, histories.DAMAGED)
        attach.open_at_io(context, device, origin)


def _tells_of_damage(error: Exception) -> bool:
    """Of a state file: it is not there, or not what it should be."""
    return isinstance(error, HistoryError | FileNotFoundError) or getattr(error, "errno", None) == errno.EBADMSG


def _claimed_origin(context: Context, device: DeviceEntry, patience: float) -> int:
    name = naming.origin_descriptor_name(device.key)
    try:
        return context.keeper.get(name)
    except OSError:
        pass  # the keeper is another one: the claim ended with the former
    descriptor = reclaim(device.origin, DeviceNumber(*device.number), patience)
    try:
        context.keeper.put(name, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _at_once(function: Callable[[DeviceEntry], object], devices: list[DeviceEntry]) -> None:
    if devices:
        with ThreadPoolExecutor(min(len(devices), _AT_ONCE), thread_name_prefix="recovery") as threads:
            list(threads.map(function, devices))
