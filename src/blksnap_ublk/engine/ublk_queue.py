# SPDX-License-Identifier: MIT
"""The ublk transport."""

from __future__ import annotations

import enum
from typing import Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.counters import Counters, read_counters
from blksnap_ublk.engine.device import Device
from blksnap_ublk.engine.handle import Handle, check, create
from blksnap_ublk.engine.image import Image
from blksnap_ublk.engine.py_queue import PyQueue
from blksnap_ublk.engine.serving import served
from blksnap_ublk.engine.thread import Thread


class UblkStatus(enum.IntEnum):
    """ARMED: every tag is fetched. STOPPING: the kernel takes tags back. DONE: all are back and no request is out."""

    ARMED = lib.BSU_UBLK_ARMED
    STOPPING = lib.BSU_UBLK_STOPPING
    DONE = lib.BSU_UBLK_DONE


class UblkQueue(Handle):
    """One queue of a ublk device on a thread."""

    _name = "ublk queue"

    def __init__(
        self,
        thread: Thread,
        char_fd: int,
        *,
        queue_id: int,
        depth: int,
        desc_size: int,
        flags: int,
        zero_copy: bool,
        device: Device | None = None,
        image: Image | None = None,
        py: PyQueue | None = None,
    ) -> None:
        """Returns when every tag is armed.

        `char_fd`: /dev/ublkcN, opened by this process; duplicated. `desc_size`: bytes of a descriptor in the shared
        array. `flags`: UBLK_F_* as granted: USER_COPY is needed, AUTO_BUF_REG for `zero_copy` (else OSError
        EOPNOTSUPP). OSError ENOSPC: the thread has too few fixed buffers. After an error the device has to be stopped
        or deleted.
        """
        config = ffi.new(
            "struct bsu_ublk_config *",
            {
                "char_fd": char_fd,
                "queue_id": queue_id,
                "depth": depth,
                "desc_size": desc_size,
                "flags": flags,
                "zero_copy": zero_copy,
                **served(device, image, py),
            },
        )
        super().__init__(create(lib.bsu_ublk_start, thread.pointer, config, what=f"ublk queue {queue_id}"))

    @property
    def status(self) -> UblkStatus:
        """Where it is in its life; a change makes `notify_fd()` readable."""
        return UblkStatus(lib.bsu_ublk_status(self.pointer))

    @property
    def counters(self) -> Counters:
        """All zero for a Python target."""
        return read_counters(lib.bsu_ublk_counters, self.pointer)

    def finish(self, *, timeout_ms: int = 10_000) -> None:
        """After the device was stopped: waits until it is done and frees it. OSError(ETIMEDOUT): call it again."""
        if self._pointer is not None:
            check(lib.bsu_ublk_finish(self._pointer, timeout_ms), "finishing a ublk queue")
            self._pointer = None

    def _free(self, pointer: Any) -> None:
        self.finish()
