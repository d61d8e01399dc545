# SPDX-License-Identifier: MIT
"""Every listener gets every event, or is told which ones it missed; none delays another, or the daemon."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import pytest

from blksnap_ublk import calls
from blksnap_ublk.calls import EventBatch
from blksnap_ublk.client import connect
from blksnap_ublk.daemon.events import EventLog
from blksnap_ublk.daemon.interface import ublk_interface
from blksnap_ublk.errors import Failed
from blksnap_ublk.forms import Event
from blksnap_ublk.varlink import wire
from blksnap_ublk.varlink.connection import Connection
from blksnap_ublk.varlink.server import Server
from tests.unit.fake_service import FakeService
from tests.unit.serving import INFO

LISTENERS = 40
METHOD = f"{calls.INTERFACE}.ReadEvents"
PATIENCE = 60
LONG = "x" * 1000


class Control:
    """What serves on a listening socket that outlives it: events of a log, from a thread of its own."""

    def __init__(self, listening: socket.socket, log: EventLog) -> None:
        self.log = log
        self._ended = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(listening)))
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    async def _serve(self, listening: socket.socket) -> None:
        log = self.log

        class Service(FakeService):
            def events(
                self, since: int | None, *, follow: bool, snapshot: str | None
            ) -> AsyncGenerator[EventBatch, None]:
                return log.follow(since, follow=follow, snapshot=snapshot)

        server = Server(INFO, [ublk_interface(Service())])
        server.start(listening)
        self._ready.set()
        await self._ended.wait()
        await server.close()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._loop.close()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
        made.listen(LISTENERS)
        yield made


@contextmanager
def running(listening: socket.socket, log: EventLog) -> Iterator[Control]:
    control = Control(listening, log)
    try:
        yield control
    finally:
        control.end()


class Listener:
    """Asks for all events to come, and reads nothing unless told to."""

    def __init__(self, path: str, *, since: int | None = None) -> None:
        self._connection = Connection(path)
        parameters = calls.ReadEvents(since=since, follow=True)
        self._batches = self._connection.stream(METHOD, parameters, EventBatch)
        self.begin = next(self._batches).seq
        """The number after which it hears everything."""

    def read(self, until: int) -> list[Event]:
        """The events up to a number."""
        found: list[Event] = []
        while not found or found[-1].seq < until:
            found += next(self._batches).events
        return found

    def close(self) -> None:
        self._connection.close()


@contextmanager
def listeners(path: str, count: int) -> Iterator[list[Listener]]:
    made = [Listener(path) for _ in range(count)]
    try:
        yield made
    finally:
        for each in made:
            each.close()


def emit(log: EventLog, count: int, text: str = "") -> None:
    """From four threads at once."""
    with ThreadPoolExecutor(4) as threads:
        for _ in range(count):
            threads.submit(log.emit, "storage-grown", text=text)


def test_all_get_all(tmp_path: Path, listening: socket.socket) -> None:
    count = 3000
    log = EventLog(tmp_path / "events")
    path = str(tmp_path / "socket")
    with running(listening, log), listeners(path, LISTENERS) as made, ThreadPoolExecutor(LISTENERS) as readers:
        reading = [readers.submit(each.read, count) for each in made[1:]]
        emit(log, count)
        for each in reading:
            assert [event.seq for event in each.result(PATIENCE)] == list(range(1, count + 1))
        slow = made[0].read(count)
        assert [event.seq for event in slow] == list(range(1, count + 1)), "whoever reads late has lost none"


def test_who_never_reads_is_told_what_it_missed_and_costs_little(tmp_path: Path, listening: socket.socket) -> None:
    count, backlog = 6000, 200
    log = EventLog(tmp_path / "events", backlog=backlog)
    path = str(tmp_path / "socket")
    with running(listening, log), listeners(path, 2) as (quick, never):
        for done in range(0, count, 100):
            emit(log, 100, text=LONG)
            heard = quick.read(done + 100)
            assert [event.seq for event in heard] == list(range(done + 1, done + 101))
        late = never.read(count)
        (lost,) = [event for event in late if event.type == "lost"]
        where = late.index(lost)
        assert [event.seq for event in late[:where]] == list(range(1, where + 1))
        assert lost.data == {"first": where + 1, "last": count - backlog, "reason": "backlog"}
        assert [event.seq for event in late[where + 1 :]] == list(range(count - backlog + 1, count + 1))
        # What was kept for it: the socket's buffer, the server's up to its high-water mark, a batch or two.
        assert where * len(LONG) < 1 << 20


def test_who_does_not_even_read_the_first_answer_delays_nobody(tmp_path: Path, listening: socket.socket) -> None:
    log = EventLog(tmp_path / "events")
    path = str(tmp_path / "socket")
    with running(listening, log), ExitStack() as stack:
        for _ in range(LISTENERS):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX))
            silent.connect(path)
            silent.sendall(wire.encode_call(METHOD, calls.ReadEvents(since=0, follow=True), more=True))
        emit(log, 3000, text=LONG)
        with connect(path) as client:
            assert [event.seq for event in client.events(since=0)] == list(range(1, 3001))
            assert client.daemon_version().pid == os.getpid()


def test_a_listener_goes_on_when_control_is_replaced(tmp_path: Path, listening: socket.socket) -> None:
    """One log after another on the same file, as after a kill -9; the listening socket is the keeper's."""
    path, file = str(tmp_path / "socket"), tmp_path / "events"
    first = Control(listening, EventLog(file))
    with connect(path, start=False) as client:
        following = client.events(since=0, follow=True)
        first.log.emit("one")
        assert next(following).seq == 1
        first.log.emit("two")
        first.end()
        between = EventLog(file)
        between.emit("three")
        with running(listening, between) as second:
            assert [event.type for event in islice(following, 2)] == ["two", "three"]
            second.log.emit("four")
            assert next(following).type == "four"
            assert [event.type for event in client.events(since=2)] == ["three", "four"]
        listening.close()
        with pytest.raises(Failed, match="no answer from the daemon"):
            next(following)


def test_a_listener_to_what_comes_misses_nothing_when_control_is_replaced(
    tmp_path: Path, listening: socket.socket
) -> None:
    """It has heard no event yet: it knows from the first answer from where on it wants them."""
    path, file = str(tmp_path / "socket"), tmp_path / "events"
    log = EventLog(file)
    log.emit("before")
    first = Control(listening, log)
    heard: list[Event] = []
    with connect(path, start=False) as client:
        reader = threading.Thread(target=lambda: heard.extend(islice(client.events(follow=True), 2)))
        reader.start()
        wait_until(lambda: bool(log._listening))
        first.end()
        between = EventLog(file)
        between.emit("while nobody served")
        with running(listening, between) as second:
            second.log.emit("after")
            reader.join(PATIENCE)
    assert [event.type for event in heard] == ["while nobody served", "after"]


def wait_until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(PATIENCE * 100):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("still not so")
