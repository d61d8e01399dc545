# SPDX-License-Identifier: MIT
"""The bounded backlog of events, numbered in one row over restarts of the control process.

Everybody who listens reads the backlog at a pace of its own: nothing is kept for one listener, and none waits for
another. Who reads too slowly for the backlog gets an event `lost` in place of what it missed.
"""

from __future__ import annotations

import asyncio
import bisect
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import msgspec

from blksnap_ublk.calls import EventBatch
from blksnap_ublk.forms import Event, timestamp

BACKLOG = 4096
BATCH = 64
"""Events that are handed over at once: what somebody who does not read can keep in memory."""

_JUMP = 1 << 20  # numbers left out where nobody knows how many were given out
_REPAIR_SECONDS = 1.0  # between two attempts to write a file that lacks events
_INCOMPLETE = ".incomplete."
_ENDS = ("evicted", "expired", "destroyed")
_log = logging.getLogger(__name__)


class EventLog:
    """Events in memory and, one JSON object a line, in a file that a restarted control process reads again.

    A file that lacks events, because the state directory was full, has another name until it is complete again, which
    counts the restarts since then. That numbers are left out after each of these tells listeners of the events that are
    gone.
    """

    def __init__(self, path: Path, backlog: int = BACKLOG) -> None:
        """Goes on where the file ends; lines that are torn are dropped. Raises OSError where it cannot be read."""
        self._path = path
        former, starts = _incomplete_file(path)
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=backlog)
        self._listening: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._waking: set[asyncio.AbstractEventLoop] = set()
        lacks_events = not path.exists() and former is not None
        starts = starts + 1 if lacks_events else 0
        self._incomplete = path.with_suffix(f"{_INCOMPLETE}{starts}")
        if lacks_events and former is not None:
            former.rename(self._incomplete)  # for which there is always room
        else:
            self._remove_incomplete()
        whole = self._load(self._incomplete if lacks_events else path)
        last = self._events[-1].seq if self._events else 0
        self._next = last + 1 + starts * _JUMP
        self._lines = len(self._events)
        self._repaired: float | None = None
        if lacks_events or not whole:
            self._guarded(self._rewrite)

    def emit(self, kind: str, *, snapshot: str | None = None, device: str | None = None, **data: object) -> None:
        """Adds an event; any thread may call it, and waits for no listener."""
        with self._lock:
            event = Event(
                seq=self._next, time=timestamp(time.time()), type=kind, snapshot=snapshot, device=device, data=data
            )
            self._next += 1
            self._events.append(event)
            self._append(event)
            loops = {loop for loop, _ in self._listening} - self._waking
            for loop in loops:
                with suppress(RuntimeError):  # it has been closed
                    loop.call_soon_threadsafe(self._wake, loop)
                    self._waking.add(loop)

    def after(self, since: int | None, most: int = BACKLOG) -> list[Event]:
        """The next events that are kept, `most` of them, with numbers greater than `since`; None: from the first on.

        Events `lost` stand for those that are no longer kept. Where `since` is a number that was never given out the
        numbering has begun anew: then one of these comes first, and all that are kept.
        """
        with self._lock:
            first = self._events[0].seq if self._events else self._next
            since = first - 1 if since is None else max(since, 0)
            found = []
            if since >= self._next:
                found.append(_lost(first - 1, {"first": since + 1, "last": None, "reason": "restarted"}))
                since = first - 1
            begin = bisect.bisect_right(self._events, since, key=lambda event: event.seq)
            for event in islice(self._events, begin, begin + most):
                found += _gap(since, event.seq)
                found.append(event)
                since = event.seq
            if begin + most >= len(self._events):
                found += _gap(since, self._next)
        return found

    def end_of(self, snapshot: str) -> Event | None:
        """What ended the snapshot, as far as that is kept, whose id begins like this: `evicted`, `expired` or
        `destroyed`."""
        with self._lock:
            its = [event for event in self._events if event.snapshot and event.snapshot.startswith(snapshot)]
        ends = [event for event in its if event.type in _ENDS]
        return max(ends, key=lambda event: (event.type != "destroyed", event.seq), default=None)

    async def follow(
        self, since: int | None, *, follow: bool, snapshot: str | None = None
    ) -> AsyncGenerator[EventBatch, None]:
        """The events after `since`, and with `follow` all to come, in batches, of which the first one is empty.

        `snapshot`: only those of that id. From the first batch on nothing is missed.
        """
        position = self._begin(since, follow=follow)
        told = position
        signal = asyncio.Event()
        listener = (asyncio.get_running_loop(), signal)
        with self._lock:
            self._listening.add(listener)
        try:
            yield EventBatch(events=[], seq=position)
            while True:
                signal.clear()
                while found := self.after(position, BATCH):
                    position = found[-1].seq
                    chosen = [event for event in found if snapshot in (None, event.snapshot) or event.type == "lost"]
                    # Who waits for one snapshot is told now and then how far it has come.
                    if chosen or position - told >= BATCH:
                        told = position
                        yield EventBatch(events=chosen, seq=position)
                if not follow:
                    return
                await signal.wait()
        finally:
            with self._lock:
                self._listening.discard(listener)

    def _begin(self, since: int | None, *, follow: bool) -> int:
        """After which number somebody begins to read."""
        if since is not None:
            return since
        with self._lock:
            return self._next - 1 if follow or not self._events else self._events[0].seq - 1

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the thread of the loop."""
        with self._lock:
            self._waking.discard(loop)
            signals = [signal for its, signal in self._listening if its is loop]
        for signal in signals:
            signal.set()

    def _load(self, path: Path) -> bool:
        """Reads a file; False where it is not as it should be, or there is none."""
        text = path.read_bytes() if path.exists() else b"torn"
        lines = text.splitlines()
        for line in lines:
            try:
                event = msgspec.json.decode(line, type=Event)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            if not self._events or event.seq > self._events[-1].seq:
                self._events.append(event)
        return len(lines) == len(self._events) and text[-1:] in (b"\n", b"")

    def _append(self, event: Event) -> None:
        if self._repaired is not None:
            if time.monotonic() - self._repaired >= _REPAIR_SECONDS:
                self._guarded(self._rewrite)
        elif self._lines >= 2 * (self._events.maxlen or BACKLOG):
            self._guarded(self._rewrite)
        else:
            self._guarded(lambda: self._write_line(event))

    def _guarded(self, write: Callable[[], None]) -> None:
        """A file that cannot be written gets the name that says so, which takes no room."""
        try:
            write()
        except OSError as error:
            if self._repaired is None:
                _log.warning("%s: events are kept in memory only: %s", self._path, error)
            self._repaired = time.monotonic()
            with suppress(OSError):
                self._path.rename(self._incomplete)

    def _write_line(self, event: Event) -> None:
        line = msgspec.json.encode(event) + b"\n"
        with self._path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._lines += 1

    def _rewrite(self) -> None:
        writing = self._path.with_suffix(".writing")
        try:
            with writing.open("wb") as file:
                os.fchmod(file.fileno(), 0o600)
                for event in self._events:
                    file.write(msgspec.json.encode(event) + b"\n")
        except OSError:
            writing.unlink(missing_ok=True)
            raise
        writing.rename(self._path)
        self._remove_incomplete()
        self._lines = len(self._events)
        self._repaired = None

    def _remove_incomplete(self) -> None:
        for left in self._path.parent.glob(f"{self._path.stem}{_INCOMPLETE}*"):
            left.unlink(missing_ok=True)


def _incomplete_file(path: Path) -> tuple[Path | None, int]:
    """The file that lacks events, if there is one, and the number in its name."""
    found = [
        (int(number), each)
        for each in path.parent.glob(f"{path.stem}{_INCOMPLETE}*")
        if (number := each.name.rpartition(".")[2]).isdecimal()
    ]
    starts, last = max(found, default=(0, None))
    return last, starts


def _gap(since: int, seq: int) -> list[Event]:
    """What stands for the events between two numbers, if there are any."""
    return [_lost(seq - 1, {"first": since + 1, "last": seq - 1, "reason": "backlog"})] if since + 1 < seq else []


def _lost(seq: int, data: dict[str, object]) -> Event:
    return Event(seq=seq, time=timestamp(time.time()), type="lost", snapshot=None, device=None, data=data)
