# SPDX-License-Identifier: MIT
"""Threads that take requests for a Python target in batches and hand the results back."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import threading
import time
from collections.abc import Callable
from types import TracebackType

from blksnap_ublk import engine
from blksnap_ublk.ublk.negotiation import DataPath
from blksnap_ublk.ublk.params import Params
from blksnap_ublk.ublk.pytarget import PyTarget, abilities, params_of
from blksnap_ublk.ublk.serving import Backend
from blksnap_ublk.ublk.target import Target

log = logging.getLogger(__name__)

MAX_SLOTS = 32
"""Requests that are with Python at once; the others wait in their queues."""
_BATCH = 32
_ANSWER_AFTER = 0.0005
END_TIMEOUT = 5.0

# plain numbers: looking up members of an enum costs more than the rest of what is done for a request
_READ, _WRITE, _FLUSH, _DISCARD, _WRITE_ZEROES = map(
    int, (engine.Op.READ, engine.Op.WRITE, engine.Op.FLUSH, engine.Op.DISCARD, engine.Op.WRITE_ZEROES)
)
_FUA = int(engine.Flags.FUA)


class PyService(Target):
    """Serves a PyTarget: its buffers, its worker threads, and what its exceptions become."""

    needs_copy = "a target written in Python works on copies of the data"

    def __init__(self, target: PyTarget) -> None:
        """Raises TypeError when the target has no `read`."""
        self._target = target
        self._able = abilities(target)
        self._workers: list[threading.Thread] = []
        self._queue: engine.PyQueue | None = None
        self._seen: set[tuple[type[BaseException], object, int]] = set()

    def params(self, data_path: DataPath, max_io: int) -> Params:
        return params_of(self._target, max_io)

    def begin(self, requests: int, max_io: int) -> Backend:
        queue = engine.PyQueue(min(requests, max(MAX_SLOTS, self._target.workers)), max_io)
        self._queue = queue
        for index in range(self._target.workers):
            worker = threading.Thread(target=self._work, args=(queue,), name=f"py-target-{index}", daemon=True)
            self._workers.append(worker)
            worker.start()
        return Backend(py=queue)

    def end(self) -> None:
        """A call of the target that does not return leaves its thread and the buffers behind, with a warning."""
        if self._queue is None:
            return
        self._queue.shutdown()
        for worker in self._workers:
            worker.join(END_TIMEOUT)
        name = type(self._target).__name__
        if stuck := [worker.name for worker in self._workers if worker.is_alive()]:
            log.warning("%s: still busy in %s", name, ", ".join(stuck))
        else:
            self._queue.close()
        self._queue = None

    def _work(self, queue: engine.PyQueue) -> None:
        handlers = self._handlers()
        buffers = [queue.buffer(slot) for slot in range(queue.slots)]
        data = [buffer.toreadonly() for buffer in buffers]
        waiting = select.poll()
        waiting.register(queue.event_fd, select.POLLIN)
        # one of several workers must not hold what another could do
        limit = 1 if self._target.workers > 1 else _BATCH
        clock = time.monotonic
        while True:
            try:
                batch = queue.take(limit)
            except OSError:  # shut down
                return
            if not batch:
                waiting.poll()
                continue
            slots: list[int] = []
            results: list[int] = []
            answer_at = clock() + _ANSWER_AFTER
            for slot, op, flags, start, length in batch:
                view = (data if op == _WRITE else buffers)[slot][:length]
                try:
                    handlers[op](start, length, view, flags)
                    result = length
                except OSError as error:
                    result = -(error.errno or errno.EIO)
                except BaseException as error:  # whatever it is, the device lives on
                    self._report(op, start, length, error)
                    result = -errno.EIO
                with contextlib.suppress(BufferError):
                    view.release()  # whoever has kept it gets a ValueError, not the data of another request
                slots.append(slot)
                results.append(result)
                if clock() > answer_at:  # a slow target: what is done does not wait for the rest of the batch
                    self._answer(queue, slots, results)
                    slots.clear()
                    results.clear()
                    answer_at = clock() + _ANSWER_AFTER
            if slots:
                self._answer(queue, slots, results)

    def _answer(self, queue: engine.PyQueue, slots: list[int], results: list[int]) -> None:
        with contextlib.suppress(OSError):  # shut down meanwhile: they have been answered with EIO
            queue.commit(slots, results)

    def _handlers(self) -> dict[int, Callable[[int, int, memoryview, int], None]]:
        """For each op that can arrive, what to do with (start, length, buffer of the slot, flags)."""
        target = self._target
        read = target.read  # type: ignore[attr-defined]  # abilities() has seen it

        def handle_read(start: int, length: int, buffer: memoryview, flags: int) -> None:
            read(start, buffer)

        handlers: dict[int, Callable[[int, int, memoryview, int], None]] = {_READ: handle_read}
        for op, name, make in (
            (_WRITE, "write", _writer),
            (_FLUSH, "flush", _flusher),
            (_DISCARD, "discard", _ranger),
            (_WRITE_ZEROES, "write_zeroes", _ranger),
        ):
            handlers[op] = (
                make(getattr(target, name), getattr(target, "flush", None)) if name in self._able else _refuse
            )
        return handlers

    def _report(self, op: int, start: int, length: int, error: BaseException) -> None:
        """One traceback for each place that an exception comes from, one line for each of its repetitions."""
        place = _origin_of(error.__traceback__)
        key = (type(error), *place)
        what = f"{type(self._target).__name__}: op {op} at {start}, {length} bytes"
        if key in self._seen:
            log.error("%s: %s: %s", what, type(error).__name__, error)
        else:
            self._seen.add(key)
            log.error("%s: ended with EIO", what, exc_info=error)


def _writer(write: Callable[[int, memoryview], None], flush: Callable[[], None] | None) -> Callable[..., None]:
    def handle(start: int, length: int, buffer: memoryview, flags: int) -> None:
        write(start, buffer)
        if flags & _FUA and flush is not None:
            flush()

    return handle


def _flusher(flush: Callable[[], None], _: object) -> Callable[..., None]:
    def handle(start: int, length: int, buffer: memoryview, flags: int) -> None:
        flush()

    return handle


def _ranger(method: Callable[[int, int], None], flush: Callable[[], None] | None) -> Callable[..., None]:
    def handle(start: int, length: int, buffer: memoryview, flags: int) -> None:
        method(start, length)
        if flags & _FUA and flush is not None:
            flush()

    return handle


def _refuse(start: int, length: int, buffer: memoryview, flags: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "not offered")


def _origin_of(trace: TracebackType | None) -> tuple[object, int]:
    """The code and the line where an exception was raised."""
    if trace is None:
        return None, 0
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code, trace.tb_lineno
