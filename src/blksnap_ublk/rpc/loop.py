# SPDX-License-Identifier: MIT
"""The event loop of a process that serves: descriptors, timers and signals, in one thread."""

import heapq
import itertools
import logging
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

log = logging.getLogger(__name__)


class HasFileno(Protocol):
    """What can be watched: a socket, a file, anything with a descriptor."""

    def fileno(self) -> int: ...


@dataclass(order=True)
class Timer:
    """A call that is due at a time of the monotonic clock."""

    due: float
    order: int
    callback: Callable[[], None] = field(compare=False)
    cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        """Do not call it any more."""
        self.cancelled = True


class Loop:
    """Calls back, one at a time, in the thread that called `run`. What one raises is logged; the loop goes on."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[Timer] = []
        self._order = itertools.count()
        self._signals: dict[int, Callable[[], None]] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._running = False

    def watch(self, source: int | HasFileno, callback: Callable[[], None]) -> None:
        """Call back whenever `source` is readable, or its other end is gone."""
        self._selector.register(source, selectors.EVENT_READ, callback)

    def unwatch(self, source: int | HasFileno) -> None:
        """Before `source` is closed."""
        self._selector.unregister(source)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back once, after `seconds`."""
        timer = Timer(time.monotonic() + seconds, next(self._order), callback)
        heapq.heappush(self._timers, timer)
        return timer

    def on_signal(self, number: int, callback: Callable[[], None]) -> None:
        """Call back after signal `number`. Main thread only."""
        if self._wakeup is None:
            self._wakeup = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
            self.watch(self._wakeup[0], self._on_wakeup)
        self._signals[number] = callback
        signal.signal(number, lambda *_: None)

    def run(self) -> None:
        """Serve until `stop`."""
        self._running = True
        while self._running:
            for key, _ in self._selector.select(self._until_next()):
                # An earlier callback of this round may have closed it, and the number may be in use again.
                if self._running and self._selector.get_map().get(key.fd) is key:
                    self._call(key.data)
            while self._running and self._timers and self._timers[0].due <= time.monotonic():
                timer = heapq.heappop(self._timers)
                if not timer.cancelled:
                    self._call(timer.callback)

    def stop(self) -> None:
        """Let `run` return after the callback that is under way."""
        self._running = False

    def close(self) -> None:
        """Give up the loop's own descriptors; what was watched stays its owner's."""
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            for number in self._signals:
                signal.signal(number, signal.SIG_DFL)
            for end in self._wakeup:
                end.close()
            self._wakeup = None
        self._selector.close()

    def _until_next(self) -> float | None:
        while self._timers and self._timers[0].cancelled:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].due - time.monotonic()) if self._timers else None

    def _on_wakeup(self) -> None:
        assert self._wakeup is not None
        for number in self._wakeup[0].recv(256):
            callback = self._signals.get(number)
            if callback is not None:
                self._call(callback)

    @staticmethod
    def _call(callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            log.exception("unexpected error; going on")
