# SPDX-License-Identifier: MIT
"""Calls over a real socket: answers, descriptors, and nothing left open whatever the peer sends."""

import array
import errno
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blksnap_ublk.rpc.channel import DESCRIPTOR_LIMIT, Channel, listen
from blksnap_ublk.rpc.client import Client
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.rpc.loop import Loop
from blksnap_ublk.rpc.server import Reply, Server

LIMIT = 128 << 10


class Echo(msgspec.Struct, tag="echo", frozen=True):
    text: str


class Keep(msgspec.Struct, tag="keep", frozen=True):
    """The first descriptor is taken; its file is told by its inode."""


class Fail(msgspec.Struct, tag="fail", frozen=True):
    number: int


class Bug(msgspec.Struct, tag="bug", frozen=True):
    pass


Message = Echo | Keep | Fail | Bug


class Said(msgspec.Struct, tag="said", frozen=True):
    text: str


class No(msgspec.Struct, tag="no", frozen=True):
    errno: int
    text: str


Answer = Said | No


class Served:
    """A server in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: list[int] = []
        self.loop = Loop()
        self.server = Server(self.loop, listen(path), cast("type[Message]", Message), self._handle, _no, LIMIT)
        self._stop_hear, self._stop_say = os.pipe()
        self.loop.watch(self._stop_hear, self.loop.stop)
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def _handle(self, message: Message, descriptors: Descriptors) -> Reply:
        match message:
            case Echo(text):
                taken = [descriptors.take(index) for index in range(len(descriptors))]
                self.kept += taken
                return Reply(Said(text), taken)
            case Keep():
                self.kept.append(descriptors.take(0))
                return Reply(Said(str(os.fstat(self.kept[-1]).st_ino)))
            case Fail(number):
                raise OSError(number, os.strerror(number))
            case Bug():
                raise ValueError("a mistake")

    def connect(self) -> Client[Answer]:
        return Client(self.path, cast("type[Answer]", Answer), LIMIT)

    def close(self) -> None:
        os.write(self._stop_say, b"x")
        self.thread.join()
        self.loop.unwatch(self._stop_hear)
        self.server.close()
        self.loop.close()
        for descriptor in (*self.kept, self._stop_hear, self._stop_say):
            os.close(descriptor)


def _no(error: OSError) -> No:
    return No(error.errno or errno.EIO, error.strerror or str(error))


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    before = open_descriptors()
    served = Served(tmp_path / "s")
    try:
        yield served
    finally:
        served.close()
    assert open_descriptors() == before


def test_a_call_brings_its_answer_and_descriptors(served: Served, tmp_path: Path) -> None:
    with open(tmp_path / "f", "w+b") as file:
        client = served.connect()
        answer, descriptors = client.call(Echo("ä" * 1000), [file.fileno()])
        with descriptors:
            assert answer == Said("ä" * 1000)
            assert os.path.sameopenfile(descriptors[0], file.fileno())
            assert not os.get_inheritable(descriptors[0])
        client.close()


def test_a_descriptor_that_is_taken_stays_open(served: Served, tmp_path: Path) -> None:
    with open(tmp_path / "f", "w+b") as file:
        client = served.connect()
        answer, _ = client.call(Keep(), [file.fileno()])
        assert answer == Said(str(os.fstat(file.fileno()).st_ino))
        assert not os.get_inheritable(served.kept[0])
        client.close()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Fail(errno.ENOSPC), No(errno.ENOSPC, "No space left on device")),
        (Bug(), No(errno.EIO, "internal error: ValueError: a mistake")),
        (Keep(), No(errno.EIO, "internal error: IndexError: list index out of range")),
    ],
)
def test_what_a_handler_raises_is_answered_and_the_connection_lives(
    served: Served, message: Message, expected: No
) -> None:
    client = served.connect()
    assert client.call(message)[0] == expected
    assert client.call(Echo("on"))[0] == Said("on")
    client.close()


def test_messages_that_are_too_large_are_refused_and_the_connection_lives(served: Served) -> None:
    client = served.connect()
    with pytest.raises(OSError, match="bytes") as caught:
        client.call(Echo("x" * LIMIT))
    assert caught.value.errno == errno.EMSGSIZE
    hear, say = os.pipe()
    with pytest.raises(OSError, match="descriptors"):
        client.call(Echo(""), [hear] * (DESCRIPTOR_LIMIT + 1))
    # An answer of exactly the limit fits; the echo of a text that JSON escapes to a longer one does not.
    assert client.call(Echo("y" * (LIMIT - 100)))[0] == Said("y" * (LIMIT - 100))
    answer, descriptors = client.call(Echo("z"), [hear] * DESCRIPTOR_LIMIT)
    assert answer == Said("z")
    assert len(descriptors) == DESCRIPTOR_LIMIT
    descriptors.close()
    client.close()
    os.close(hear)
    os.close(say)


def raw(served: Served) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    connection.connect(str(served.path))
    return connection


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.binary(min_size=1, max_size=300), count=st.integers(0, 3))
def test_garbage_with_descriptors_is_refused_and_leaks_nothing(served: Served, payload: bytes, count: int) -> None:
    hear, say = os.pipe()
    with raw(served) as connection:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [say] * count).tobytes())] if count else []
        connection.sendmsg([payload], rights)
        answer = msgspec.json.decode(connection.recv(LIMIT), type=cast("type[Answer]", Answer))
        assert isinstance(answer, No)
        assert answer.errno == errno.EBADMSG
        assert connection.recv(1) == b""
    os.close(say)
    # The pipe's other end is at its end: nobody has kept a duplicate.
    assert os.read(hear, 1) == b""
    os.close(hear)


def test_a_message_that_is_cut_is_refused(served: Served) -> None:
    with raw(served) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LIMIT)
        connection.send(b"x" * (LIMIT + 1))
        answer = msgspec.json.decode(connection.recv(LIMIT), type=cast("type[Answer]", Answer))
        assert isinstance(answer, No)
        assert connection.recv(1) == b""


def test_a_client_that_goes_away_or_does_not_read_harms_nobody(served: Served) -> None:
    with raw(served) as deaf, raw(served) as gone:
        question = msgspec.json.encode(Echo("x" * 60000))
        gone.send(question)
        gone.close()
        deaf.setblocking(False)
        for _ in range(64):
            try:
                deaf.send(question)
            except OSError:
                break
        client = served.connect()
        assert client.call(Echo("still here"), timeout=10)[0] == Said("still here")
        client.close()


def test_a_call_without_an_answer_closes_the_connection(tmp_path: Path) -> None:
    with listen(tmp_path / "s") as listener:
        client: Client[Answer] = Client(tmp_path / "s", cast("type[Answer]", Answer), LIMIT)
        with pytest.raises(TimeoutError):
            client.call(Echo("anybody?"), timeout=0.05)
        assert not client.connected
        with pytest.raises(OSError, match="closed"):
            client.call(Echo("again"))
        client = Client(tmp_path / "s", cast("type[Answer]", Answer), LIMIT)
        for _ in range(2):
            connection, _ = listener.accept()
            connection.close()
        with pytest.raises(ConnectionError):
            client.call(Echo("anybody?"))
        assert not client.connected


def test_an_answer_that_is_none_is_an_error_and_leaks_nothing(tmp_path: Path) -> None:
    hear, say = os.pipe()
    with listen(tmp_path / "s") as listener:
        client: Client[Answer] = Client(tmp_path / "s", cast("type[Answer]", Answer), LIMIT)
        connection, _ = listener.accept()
        server = Channel(connection, LIMIT)
        server.send(b'{"type": "what"}', [say])
        with pytest.raises(OSError, match="not an answer") as caught:
            client.call(Echo("?"), timeout=10)
        assert caught.value.errno == errno.EBADMSG
        server.close()
    os.close(say)
    assert os.read(hear, 1) == b""
    os.close(hear)


def test_calls_of_many_threads_get_their_own_answers(served: Served) -> None:
    client = served.connect()
    wrong: list[str] = []

    def ask(name: str) -> None:
        for number in range(200):
            answer, _ = client.call(Echo(f"{name}{number}"))
            if answer != Said(f"{name}{number}"):
                wrong.append(f"{name}{number}")

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    client.close()


def test_a_socket_is_private_and_replaces_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listen(path).close()
    with listen(path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
        Client(path, cast("type[Answer]", Answer)).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_stranger_is_turned_away() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        served = Served(Path(directory) / "s")
        try:
            os.chmod(served.path, 0o666)
            assert _as_nobody(served.path) == 0
        finally:
            served.close()


def _as_nobody(path: Path) -> int:
    """0 when a process of another user is closed out without an answer."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            os.setgid(65534)
            os.setuid(65534)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.settimeout(10)
            connection.connect(str(path))
            try:
                connection.send(msgspec.json.encode(Echo("let me in")))
                status = 0 if connection.recv(LIMIT) == b"" else 1
            except ConnectionError:
                status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("payload", [b'{"type":"echo","text":"\xff"}', b'{"x":' + b"[" * 5000, b"\xff\xfe"])
def test_what_is_not_utf_8_or_too_deep_is_answered_too(served: Served, payload: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(str(served.path))
        connection.send(payload)
        answer = msgspec.json.decode(connection.recv(LIMIT), type=No)
        assert answer.errno == errno.EBADMSG


def test_an_answer_that_is_not_utf_8_is_an_error_of_the_call(tmp_path: Path) -> None:
    with listen(tmp_path / "s") as listener:
        client: Client[Answer] = Client(tmp_path / "s", cast("type[Answer]", Answer), LIMIT)
        server = Channel(listener.accept()[0], LIMIT)
        server.send(b'{"type": "said", "text": "\xff"}')
        with pytest.raises(OSError, match="not an answer"):
            client.call(Echo("?"), timeout=10)
        server.close()
