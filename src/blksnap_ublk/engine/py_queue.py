# SPDX-License-Identifier: MIT
"""Requests of targets written in Python, in batches."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.handle import Handle, check, create

_REQUEST = struct.Struct("=IBBxxQQ")


class PyRequest(NamedTuple):
    """One request. `op`, `flags`: values of Op and Flags. `slot`: has the buffer with its data; what `commit` takes."""

    slot: int
    op: int
    flags: int
    start: int
    length: int


class PyQueue(Handle):
    """The requests of all queues that serve one Python target. Any thread may take and commit."""

    _name = "Python queue"

    def __init__(self, slots: int, max_bytes: int) -> None:
        """`slots`: requests at once, each with a buffer of at least `max_bytes`."""
        stride = (max_bytes + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        # an anonymous mapping of its own: it goes away with the last view of it
        memory = memoryview(mmap.mmap(-1, slots * stride))
        self._memory = ffi.from_buffer(memory)
        super().__init__(create(lib.bsu_py_new, self._memory, slots, stride, what="Python queue"))
        self.slots = slots
        self._buffers = [memory[slot * stride : (slot + 1) * stride] for slot in range(slots)]

    @property
    def event_fd(self) -> int:
        """A descriptor that is readable while requests wait, and for ever after `shutdown`."""
        return int(lib.bsu_py_event_fd(self.pointer))

    def buffer(self, slot: int) -> memoryview:
        """The buffer of a slot: the data of a write, or where the data of a read is put before its commit."""
        return self._buffers[slot]

    def take(self, limit: int = 64) -> list[PyRequest]:
        """Up to `limit` requests, none when none waits. OSError(ESHUTDOWN) after `shutdown`."""
        # of its own for each call: several threads may be here
        out = ffi.new("struct bsu_py_request[]", limit)
        count = check(lib.bsu_py_take(self.pointer, out, limit), "Python queue")
        return list(map(PyRequest._make, _REQUEST.iter_unpack(ffi.buffer(out, count * _REQUEST.size))))

    def commit(self, slots: Sequence[int], results: Sequence[int]) -> None:
        """Ends requests: -errno, or 0 or more. OSError(EINVAL) when a slot was not taken; the others end."""
        if len(slots) != len(results):
            raise ValueError(f"{len(slots)} slots and {len(results)} results")
        check(
            lib.bsu_py_commit(self.pointer, ffi.new("uint32_t[]", slots), ffi.new("int32_t[]", results), len(slots)),
            "commit",
        )

    def shutdown(self) -> None:
        """Nobody serves the target any more: its requests, those to come too, end with EIO."""
        lib.bsu_py_close(self.pointer)

    def _free(self, pointer: Any) -> None:
        """OSError(EBUSY) while queues serve the target. Views of buffers may live on, they mean nothing any more."""
        check(lib.bsu_py_free(pointer), "closing a Python queue")
        self._buffers = []
        self._memory = None
