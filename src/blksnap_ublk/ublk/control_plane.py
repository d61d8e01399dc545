# SPDX-License-Identifier: MIT
"""The steps in the life of a device that need no descriptor of it: made, started, stopped, deleted.

Together with `serving` they make a device. The two halves may be in different processes: one sends the commands, the
other opens `/dev/ublkcN` and runs the queues.

    control side                         serving side
    info = create_device(control, …)
    control.set_params(info.id, params)
                                         fd = open_char(info.id)
                                         queues = start_queues(fd, info, …)     all tags armed
    start_device(control, info, pid)                                            the disk exists
    …
    stopping.stop_device(control, id)                                           all tags come back
                                         finish_queues(queues); close(fd)
    delete_device(control, id)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from dataclasses import replace
from pathlib import Path

from blksnap_ublk.ublk.control import DEFAULT_TIMEOUT, Control
from blksnap_ublk.ublk.device_info import ANY_ID, DeviceInfo
from blksnap_ublk.ublk.features import Features
from blksnap_ublk.ublk.negotiation import Wish, attempts

log = logging.getLogger(__name__)

DEFAULT_MAX_IO = 512 << 10


def create_device(
    control: Control,
    wish: Wish,
    *,
    queues: int = 1,
    depth: int = 128,
    max_io: int = DEFAULT_MAX_IO,
    device_id: int = ANY_ID,
    server_flags: int = 0,
) -> DeviceInfo:
    """ADD_DEV: returns the device as granted. `server_flags`: 64 bits which the kernel keeps for its servers.

    Asks for as much as the driver can give (`negotiation`); act on the flags returned, by `negotiation.settle`. Raises
    OSError, ValueError for numbers out of range.
    """
    try:
        possible: Features | None = control.features()
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTTY):
            raise
        possible = None
    wanted = DeviceInfo(
        id=device_id, queues=queues, depth=depth, max_io_bytes=max_io, flags=Features(0), server_flags=server_flags
    )
    refusal: OSError | None = None
    for flags in attempts(wish, possible):
        try:
            return control.add(replace(wanted, flags=flags))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            refusal = error
    assert refusal is not None
    raise refusal


def start_device(control: Control, device_id: int, pid: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
    """START_DEV: the disk exists when it returns. To be called when `pid` has armed its queues, not by `pid` itself.

    Raises OSError; TimeoutError when the queues were not armed in time.
    """
    control.start(device_id, pid, timeout=timeout)
    tune(device_id)


def tune(device_id: int) -> None:
    """Sets what the kernel's defaults get wrong for a device that hands its requests on: no second I/O scheduler."""
    scheduler = Path(f"/sys/block/ublkb{device_id}/queue/scheduler")
    with contextlib.suppress(OSError):
        if "[none]" not in scheduler.read_text() and "none" in scheduler.read_text():
            scheduler.write_text("none")


def start_recovery(control: Control, device_id: int, *, timeout: float) -> DeviceInfo:
    """START_USER_RECOVERY, tried again until the last I/O of the old server is done. Raises TimeoutError, OSError."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            control.start_recovery(device_id)
            return control.info(device_id)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, error.strerror) from None
        time.sleep(0.05)


def delete_device(control: Control, device_id: int, *, wait: bool = True, timeout: float = DEFAULT_TIMEOUT) -> None:
    """DEL_DEV of a stopped device; one that is gone already is no error.

    The device goes when everybody has closed its nodes. With `wait`, so does this, and raises TimeoutError naming the
    holders when that takes longer than `timeout`.
    """
    try:
        control.delete(device_id, wait=wait, timeout=timeout)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return
        raise


def discard_unstarted(control: Control, device_id: int) -> None:
    """Undoes `create_device` on an error path, without waiting for descriptors that are still open; logs failures."""
    try:
        control.delete(device_id, wait=False)
    except OSError as error:
        if error.errno != errno.ENODEV:
            log.warning("device %d could not be deleted: %s", device_id, error)
