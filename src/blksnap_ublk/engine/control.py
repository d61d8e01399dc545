# SPDX-License-Identifier: MIT
"""The ring to /dev/ublk-control."""

from __future__ import annotations

from typing import Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.handle import Handle, check, create


class Control(Handle):
    """Sends control commands, one at a time."""

    _name = "ublk control"

    def __init__(self) -> None:
        """OSError(ENOENT) where the kernel has no ublk."""
        super().__init__(create(lib.bsu_control_open, what="/dev/ublk-control"))

    def command(
        self,
        command: int,
        dev_id: int,
        *,
        queue_id: int = 0xFFFF,
        buffer: bytearray | None = None,
        data: int = 0,
        timeout_ms: int = 10_000,
    ) -> int:
        """Sends UBLK_U_CMD_* and waits for its end; `buffer` is what it reads and fills in, `data` the word data[0].

        `dev_id` -1 asks the kernel to choose. OSError with the driver's errno, ETIME when it has not ended in time.
        """
        pinned = ffi.NULL if buffer is None else ffi.from_buffer(buffer, require_writable=True)
        try:
            result = lib.bsu_control_command(
                self.pointer,
                command,
                dev_id & 0xFFFFFFFF,
                queue_id,
                pinned,
                0 if buffer is None else len(buffer),
                data,
                timeout_ms,
            )
        finally:
            if buffer is not None:
                ffi.release(pinned)
        return check(result, "ublk control command")

    def _free(self, pointer: Any) -> None:
        lib.bsu_control_close(pointer)
