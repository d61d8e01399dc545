# SPDX-License-Identifier: MIT
"""What dead threads had released early is stored."""

from __future__ import annotations

import errno
from typing import Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.handle import Handle, check, create, pin
from blksnap_ublk.engine.storage import Storage
from blksnap_ublk.engine.thread import Thread


class Storing(Handle):
    """Begins at once, on the storage ring of `thread`; to be closed when `result` is there, OSError(EBUSY) before."""

    _name = "storing"

    def __init__(self, thread: Thread, storage: Storage, buffers: Any) -> None:
        """`buffers`: what dead threads were given, several times BUFFERS_BYTES, of any storages. Kept until close."""
        self._memory = pin(buffers)
        try:
            pointer = create(
                lib.bsu_storing_start, thread.pointer, storage.pointer, self._memory, len(self._memory), what="storing"
            )
        except OSError:
            ffi.release(self._memory)
            raise
        super().__init__(pointer)
        self._storage = storage.hold()

    @property
    def result(self) -> int | None:
        """None while it is under way; then 0, or an errno when something could not be stored."""
        result = int(lib.bsu_storing_result(self.pointer))
        return None if result == -errno.EBUSY else -result

    def _free(self, pointer: Any) -> None:
        check(lib.bsu_storing_free(pointer), "storing")
        self._storage.let_go()
        ffi.release(self._memory)
