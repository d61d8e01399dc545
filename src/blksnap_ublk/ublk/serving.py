# SPDX-License-Identifier: MIT
"""The half of a device's life that holds `/dev/ublkcN`: opened, its queues run, ended. Sends no control command."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from blksnap_ublk import engine
from blksnap_ublk.ublk import holding
from blksnap_ublk.ublk.device_info import DESC_SIZE, DeviceInfo, char_path
from blksnap_ublk.ublk.negotiation import DataPath

_TRANSIENT = {errno.EBUSY, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV}
_RETRY = 0.02


@dataclass(frozen=True)
class Backend:
    """What answers the requests of a device: exactly one of the three."""

    device: engine.Device | None = None
    image: engine.Image | None = None
    py: engine.PyQueue | None = None

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.device, self.image, self.py)) != 1:
            raise ValueError("a backend is a device, an image or a Python queue: exactly one of them")


def open_char(device_id: int, *, timeout: float = 10.0) -> int:
    """Opens `/dev/ublkcN`, which takes one opener at a time; the caller closes the descriptor.

    udev may hold the node for a moment, or give it its permissions late: tried again until `timeout` seconds are over,
    then OSError naming who has it. Only the process that opened it can map the queues: never fork in between.
    """
    path = char_path(device_id)
    deadline = time.monotonic() + timeout
    while True:
        try:
            # without O_NONBLOCK io_uring would hand reads and writes of it to a worker thread
            return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _TRANSIENT or time.monotonic() >= deadline:
                text = error.strerror or ""
                if error.errno == errno.EBUSY and (held := holding.servers(device_id)):
                    text += f": open in {', '.join(held)}"
                raise OSError(error.errno, f"{text} (tried for {timeout:g} s)", path) from None
        time.sleep(_RETRY)


def start_queues(
    threads: Sequence[engine.Thread], char_fd: int, info: DeviceInfo, data_path: DataPath, backend: Backend
) -> list[engine.UblkQueue]:
    """Arms every tag of every queue of a device, spread over `threads`; START_DEV may be sent when it returns.

    Raises UnfinishedQueues, an OSError, when one cannot be armed: those that were end when the device is stopped.
    """
    queues: list[engine.UblkQueue] = []
    try:
        for index in range(info.queues):
            queues.append(
                engine.UblkQueue(
                    threads[index % len(threads)],
                    char_fd,
                    queue_id=index,
                    depth=info.depth,
                    desc_size=DESC_SIZE,
                    flags=int(info.flags),
                    zero_copy=data_path is DataPath.ZERO_COPY,
                    device=backend.device,
                    image=backend.image,
                    py=backend.py,
                )
            )
    except OSError as error:
        raise UnfinishedQueues(error, queues, f"queue {len(queues)} of device {info.id} could not be armed") from error
    return queues


class UnfinishedQueues(OSError):
    """A device could not be armed; `queues` are those that wait for the device to be stopped."""

    def __init__(self, cause: OSError, queues: list[engine.UblkQueue], text: str) -> None:
        super().__init__(cause.errno, f"{text}: {cause.strerror}")
        self.queues = queues


def finish_queues(queues: list[engine.UblkQueue], *, timeout: float = 10.0) -> None:
    """After the device was stopped: waits until every tag is back and its I/O has ended, and frees the queues.

    Those that have ended are taken out of the list, so that it can be called again. Raises TimeoutError.
    """
    deadline = time.monotonic() + timeout
    while queues:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            # in slices, so that a signal handler of Python's gets its turn
            queues[-1].finish(timeout_ms=max(1, int(min(left, 0.1) * 1000)))
        except OSError as error:
            if error.errno not in (errno.ETIMEDOUT, errno.EBUSY):
                raise
            if time.monotonic() >= deadline:
                text = f"{len(queues)} queues still have requests after {timeout:g} s"
                raise TimeoutError(errno.ETIMEDOUT, text) from None
        else:
            queues.pop()
