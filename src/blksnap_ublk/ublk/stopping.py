# SPDX-License-Identifier: MIT
"""Stopping a device without losing what the kernel has cached of it.

STOP_DEV of a device with recovery flags throws dirty page cache away. So it is written back first, through the disk and
each of its partitions, while nobody else can claim the disk.

Not to be called in the process that serves the device: it waits for the device. `helper` has a process for that.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time

from blksnap_ublk.errors import BlksnapError, Busy
from blksnap_ublk.host import blockdev, holders, pagecache
from blksnap_ublk.ublk import holding
from blksnap_ublk.ublk.control import DEFAULT_TIMEOUT, Control
from blksnap_ublk.ublk.device_info import DeviceState, block_path
from blksnap_ublk.ublk.features import Features

log = logging.getLogger(__name__)

_PASSING = 0.5
"""Seconds that somebody may have the disk open in passing, as udev does after each writer."""


def stop_device(control: Control, device_id: int, *, force: bool = False, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Writes back what is cached of a live device and removes its disk; its server gets its queues back.

    Without `force`, OSError(EBUSY) naming the users when the disk is in use, and EIO when writing back fails: the
    device goes on in both cases. With it, users get errors from then on. A device that was never started, or is stopped
    already, only gives the queues back. `timeout` limits the command; writing back takes as long as it takes.
    """
    info = control.info(device_id)
    if info.state is not DeviceState.LIVE or not os.path.exists(block_path(device_id)):
        # Without a server nothing can be written back, and waiting for it would be for ever.
        control.stop(device_id, timeout=timeout)
        return
    if force:
        try:
            _write_back_while_served(control, device_id)
        except OSError as error:
            log.warning("%s: stopped although its cached data could not be written: %s", info.block_path, error)
        control.stop(device_id, timeout=timeout)
        return
    deadline = time.monotonic() + _PASSING
    while True:
        try:
            if Features.SAFE_STOP_DEV in info.flags:
                _refuse_if_used(device_id)
                _write_back_while_served(control, device_id)
                control.try_stop(device_id, timeout=timeout)
            else:
                _stop_claimed(control, device_id, timeout)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise
        time.sleep(0.05)


def write_back(device_id: int) -> None:
    """Writes back and drops the page cache of the disk and of its partitions. OSError(EIO) when that fails."""
    try:
        pagecache.flush_disk(blockdev.device_number(block_path(device_id)))
    except BlksnapError as error:
        raise OSError(errno.EIO, error.message) from None


def _write_back_while_served(control: Control, device_id: int) -> None:
    """`write_back`, given up when the server dies meanwhile: it would wait for the next one."""
    failure: list[OSError] = []

    def work() -> None:
        try:
            write_back(device_id)
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="write-back", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if thread.is_alive() and control.info(device_id).state is not DeviceState.LIVE:
            raise OSError(errno.EIO, f"{block_path(device_id)}: its server has died; recover it, or stop it by force")
    if failure:
        raise failure[0]


def _stop_claimed(control: Control, device_id: int, timeout: float) -> None:
    path = block_path(device_id)
    try:
        claim = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _busy(device_id) from None
        raise
    try:
        _refuse_if_used(device_id)  # others may have it open without a claim
        _write_back_while_served(control, device_id)
        control.stop(device_id, timeout=timeout)
    finally:
        os.close(claim)


def _refuse_if_used(device_id: int) -> None:
    users = holding.disk_users(device_id)
    if users:
        raise OSError(errno.EBUSY, f"{block_path(device_id)}: in use by {', '.join(users)}")


def _busy(device_id: int) -> OSError:
    path = block_path(device_id)
    try:
        found: BlksnapError = holders.busy_error(path, blockdev.device_number(path))
    except BlksnapError:
        found = Busy("in use", subject=path)
    return OSError(errno.EBUSY, found.message)
