# SPDX-License-Identifier: MIT
"""The local transport: requests of this process, without a kernel device."""

from __future__ import annotations

import time
from typing import Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.counters import Counters, read_counters
from blksnap_ublk.engine.device import Device
from blksnap_ublk.engine.handle import Handle, check, create
from blksnap_ublk.engine.image import Image
from blksnap_ublk.engine.py_queue import PyQueue
from blksnap_ublk.engine.request import Flags, Op
from blksnap_ublk.engine.serving import served
from blksnap_ublk.engine.thread import Thread


class LocalQueue(Handle):
    """A queue of requests made by any threads of this process. Requests raise OSError with the request's own error."""

    _name = "local queue"

    def __init__(
        self,
        thread: Thread,
        *,
        depth: int = 64,
        zero_copy: bool = True,
        device: Device | None = None,
        image: Image | None = None,
        py: PyQueue | None = None,
    ) -> None:
        """`depth`: requests at once. `zero_copy`: I/O uses the caller's memory where that is aligned to 512 bytes."""
        config = ffi.new(
            "struct bsu_local_config *", {"depth": depth, "zero_copy": zero_copy, **served(device, image, py)}
        )
        super().__init__(create(lib.bsu_local_start, thread.pointer, config, what="local queue"))
        self._pinned: dict[int, Any] = {}

    def read(self, start: int, buffer: Any) -> None:
        """Fills a writable buffer from byte `start` on."""
        with ffi.from_buffer(buffer, require_writable=True) as data:
            self._io(Op.READ, Flags.NONE, start, len(data), data)

    def write(self, start: int, data: Any, flags: Flags = Flags.NONE) -> None:
        """Writes a buffer at byte `start`."""
        with ffi.from_buffer(data) as memory:
            self._io(Op.WRITE, flags, start, len(memory), memory)

    def flush(self) -> None:
        """Returns when completed writes are on stable media."""
        self._io(Op.FLUSH, Flags.NONE, 0, 0, ffi.NULL)

    def discard(self, start: int, length: int) -> None:
        """Gives up the content of a range."""
        self._io(Op.DISCARD, Flags.NONE, start, length, ffi.NULL)

    def write_zeroes(self, start: int, length: int, flags: Flags = Flags.NONE) -> None:
        """Makes a range read as zeroes."""
        self._io(Op.WRITE_ZEROES, flags, start, length, ffi.NULL)

    def submit(self, op: Op, start: int, length: int = 0, buffer: Any = None, flags: Flags = Flags.NONE) -> int:
        """Starts a request and returns its tag. The buffer is in use until `wait`. OSError(EAGAIN): none is free."""
        pinned = ffi.NULL if buffer is None else ffi.from_buffer(buffer, require_writable=op is Op.READ)
        if buffer is not None and len(pinned) < length:
            raise ValueError(f"a buffer of {len(pinned)} bytes for a request of {length}")
        tag = check(lib.bsu_local_submit(self.pointer, op, flags, start, length, pinned), op.name)
        self._pinned[tag] = pinned
        return tag

    def wait(self, tag: int, *, timeout_ms: int = 60_000) -> int:
        """Waits for a request and frees its tag: bytes done, 0 without data. TimeoutError: the tag stays taken."""
        # popped first: as soon as the tag is free it may stand for another request
        pinned = self._pinned.pop(tag, ffi.NULL)
        started = time.monotonic()
        result: int = lib.bsu_local_wait(self.pointer, tag, timeout_ms)
        try:
            return check(result, f"request {tag}")
        except TimeoutError:
            if time.monotonic() - started >= timeout_ms / 1000:
                self._pinned[tag] = pinned
            raise

    @property
    def counters(self) -> Counters:
        """All zero for a Python target."""
        return read_counters(lib.bsu_local_counters, self.pointer)

    def finish(self, *, timeout_ms: int = 10_000) -> None:
        """Refuses requests (ESHUTDOWN), waits for those under way, frees it. OSError(ETIMEDOUT): call it again."""
        if self._pointer is not None:
            check(lib.bsu_local_finish(self._pointer, timeout_ms), "finishing a local queue")
            self._pointer = None
            self._pinned.clear()

    def _io(self, op: Op, flags: Flags, start: int, length: int, memory: Any) -> None:
        check(lib.bsu_local_io(self.pointer, op, flags, start, length, memory), op.name)

    def _free(self, pointer: Any) -> None:
        self.finish()
