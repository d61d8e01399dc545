# SPDX-License-Identifier: MIT
"""What waits for the disk of a device, done by a short-lived process (`helper_process`).

A server that waits in the kernel for its own device cannot be reaped when it is killed: the wait never ends because the
server is gone, and the server cannot go because it waits. The same wait in another process is harmless.
"""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
import sys
import time
from collections.abc import Callable

_PROGRAM = "blksnap_ublk.ublk.helper_process"
START_MARGIN = 30.0
"""Seconds that the helper may take beyond the limit of its command, for its own start and for writing back."""

GivenUp = Callable[[], bool]
"""Asked from time to time: whether there is no server any more, so that the helper is not waited for."""

_LOOK = 0.25  # seconds between two questions


def _never() -> bool:
    return False


def start(device_id: int, pid: int, *, timeout: float) -> None:
    """START_DEV for the server `pid`, in a helper. Raises OSError as `Control.start`."""
    _run(["start", str(device_id), str(pid), str(timeout)], timeout)


def end_recovery(device_id: int, pid: int, *, timeout: float) -> None:
    """END_USER_RECOVERY for the server `pid`, in a helper. Raises OSError as `Control.end_recovery`."""
    _run(["end-recovery", str(device_id), str(pid), str(timeout)], timeout)


def quiesce(device_id: int, *, timeout: float) -> None:
    """QUIESCE_DEV in a helper. Raises OSError as `Control.quiesce`."""
    _run(["quiesce", str(device_id), str(timeout)], timeout)


def look_for_partitions(device_id: int, *, timeout: float, given_up: GivenUp = _never) -> None:
    """`partitions.look` in a helper. Raises OSError as it does, TimeoutError."""
    _run(["look-for-partitions", str(device_id)], timeout, given_up)


def hide_partitions(device_id: int, *, timeout: float, given_up: GivenUp = _never) -> None:
    """`partitions.hide` in a helper. Raises OSError as it does, TimeoutError."""
    _run(["hide-partitions", str(device_id)], timeout, given_up)


def stop(device_id: int, *, force: bool, timeout: float, given_up: GivenUp = _never) -> None:
    """`stop_device` in a helper; raises OSError as it does, TimeoutError also when writing back takes too long."""
    _run(["force-stop" if force else "stop", str(device_id), str(timeout)], timeout, given_up)


def _run(arguments: list[str], timeout: float, given_up: GivenUp = _never) -> None:
    # A session of its own: Ctrl-C ends the server in an orderly way, for which it needs its helper.
    process = subprocess.Popen(
        [sys.executable, "-m", _PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    try:
        answer = _answer(process, timeout + START_MARGIN, given_up)
    except BaseException as error:
        process.kill()
        process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may be stuck in the kernel: left to itself
            process.wait(timeout=1)
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(errno.ETIMEDOUT, f"{arguments[0]} of device {arguments[1]} did not end") from None
        raise
    try:
        result = json.loads(answer)
    except ValueError:
        raise OSError(errno.EIO, f"the helper for {arguments[0]} ended with status {process.returncode}") from None
    if result is not None:
        raise OSError(result["errno"], result["text"])


def _answer(process: subprocess.Popen[str], timeout: float, given_up: GivenUp) -> str:
    """Raises subprocess.TimeoutExpired, at once when nothing can come of it any more."""
    end = time.monotonic() + timeout
    while True:
        try:
            return process.communicate(timeout=_LOOK)[0]
        except subprocess.TimeoutExpired:
            if given_up() or time.monotonic() > end:
                raise
