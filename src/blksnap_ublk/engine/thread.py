# SPDX-License-Identifier: MIT
"""Queue threads."""

from __future__ import annotations

from typing import Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.handle import Handle, check, create

BUFFERS_BYTES: int = lib.bsu_thread_buffers_bytes(0)
"""Bytes of a file that a thread's buffers for the difference storage take."""


class Thread(Handle):
    """A C thread with its io_uring rings and its pool of buffers; queues are put on it. It never takes the GIL."""

    _name = "thread"

    def __init__(
        self,
        *,
        cpu: int = -1,
        pool_bytes: int = 0,
        lock_fd: int = -1,
        entries: int = 0,
        slots: int = 0,
        io_flusher: bool = False,
        buffers: tuple[int, int] | None = None,
    ) -> None:
        """Starts it. 0 stands for the defaults: 8 MiB of pool, rings of 256 entries, 1024 fixed buffers.

        `cpu`: -1 for any. `lock_fd`: a flocked file to be held by the storage ring until its last I/O has ended.
        `slots`: zero-copy tags of all queues together. `io_flusher`: OSError(EPERM) where that is refused.
        `buffers`: descriptor and offset of BUFFERS_BYTES allocated, zeroed bytes of a file in memory, which outlives
        the process: writes to origins go on as soon as the old data is there, and what was not stored when the process
        died is to be stored: see `Storing`.
        """
        descriptor, offset = buffers or (-1, 0)
        config = ffi.new(
            "struct bsu_thread_config *",
            {
                "cpu": cpu,
                "pool_bytes": pool_bytes,
                "lock_fd": lock_fd,
                "entries": entries,
                "slots": slots,
                "io_flusher": io_flusher,
                "buffers_fd": descriptor,
                "buffers_offset": offset,
            },
        )
        super().__init__(create(lib.bsu_thread_start, config, what="queue thread"))

    def add_barrier(self, fd: int) -> int:
        """Lets the origin ring hold `/dev/ublkcN` until its last I/O has ended. Returns a number for `del_barrier`."""
        return check(lib.bsu_thread_add_barrier(self.pointer, fd), "barrier")

    def del_barrier(self, slot: int) -> None:
        """Lets go of it."""
        check(lib.bsu_thread_del_barrier(self.pointer, slot), "barrier")

    def stop(self, *, timeout_ms: int = 10_000) -> None:
        """Ends the thread. OSError EBUSY while it serves a queue, ETIMEDOUT if I/O is still out; it goes on then."""
        if self._pointer is not None:
            check(lib.bsu_thread_stop(self._pointer, timeout_ms), "stopping a queue thread")
            self._pointer = None

    def _free(self, pointer: Any) -> None:
        self.stop()
