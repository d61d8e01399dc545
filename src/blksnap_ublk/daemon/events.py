# SPDX-License-Identifier: MIT
"""The bounded backlog of events, numbered in one row over restarts of the control process."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec

from blksnap_ublk.forms import Event, timestamp

BACKLOG = 4096


class EventLog:
    """Events in memory and, one JSON object a line, in a file that a restarted control process reads again."""

    def __init__(self, path: Path, backlog: int = BACKLOG) -> None:
        """Goes on where the file ends; a last line that is torn is dropped. Raises OSError."""
        self._path = path
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=backlog)
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                self._events.append(msgspec.json.decode(line, type=Event))
            except msgspec.MsgspecError:
                continue
        self._next = self._events[-1].seq + 1 if self._events else 1
        self._lines = 0
        self._rewrite()

    def emit(self, kind: str, *, snapshot: str | None = None, device: str | None = None, **data: object) -> None:
        """Adds an event; any thread may call it. A full state directory loses the file's copy only."""
        with self._lock:
            event = Event(
                seq=self._next, time=timestamp(time.time()), type=kind, snapshot=snapshot, device=device, data=data
            )
            self._next += 1
            self._events.append(event)
            self._append(event)
            waiting = list(self._waiting)
        for loop, signal in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(signal.set)

    def after(self, since: int | None) -> list[Event]:
        """The events that are kept with a number greater than `since`, None for all.

        Where events after `since` are no longer kept, an event `lost` comes first, which names them.
        """
        with self._lock:
            first = self._events[0].seq if self._events else self._next
            found = [event for event in self._events if since is None or event.seq > since]
        if since is not None and since + 1 < first:
            lost = Event(
                seq=first - 1,
                time=timestamp(time.time()),
                type="lost",
                snapshot=None,
                device=None,
                data={"first": since + 1, "last": first - 1},
            )
            return [lost, *found]
        return found

    async def follow(
        self, since: int | None, *, follow: bool, snapshot: str | None = None
    ) -> AsyncGenerator[Event, None]:
        """The events after `since`; with `follow` also all to come. `snapshot`: only those of that id."""
        last = since
        if last is None and follow:
            with self._lock:
                last = self._next - 1
        signal = asyncio.Event()
        entry = (asyncio.get_running_loop(), signal)
        with self._lock:
            self._waiting.add(entry)
        try:
            while True:
                signal.clear()
                for event in self.after(last):
                    last = event.seq
                    if snapshot is None or event.snapshot == snapshot or event.type == "lost":
                        yield event
                if not follow:
                    return
                await signal.wait()
        finally:
            with self._lock:
                self._waiting.discard(entry)

    def _append(self, event: Event) -> None:
        try:
            if self._lines >= 2 * (self._events.maxlen or BACKLOG):
                self._rewrite()
                return
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(event) + b"\n")
            self._lines += 1
        except OSError:
            pass

    def _rewrite(self) -> None:
        writing = self._path.with_suffix(".writing")
        with writing.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            for event in self._events:
                file.write(msgspec.json.encode(event) + b"\n")
        writing.rename(self._path)
        self._lines = len(self._events)
