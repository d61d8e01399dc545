# SPDX-License-Identifier: MIT
"""The server over real sockets: its answers, and that no caller can harm another or leave something half done."""

import asyncio
import itertools
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blksnap_ublk.varlink import server, wire
from blksnap_ublk.varlink.connection import CallUnread, Connection, ConnectionLost
from blksnap_ublk.varlink.wire import VarlinkError
from tests.unit.serving import serving
from tests.unit.varlink.echo import DESCRIPTION, Echo, Number, Text

PREFIX = "org.example.echo."


class Served:
    """A server of Echo for one test."""

    def __init__(self, path: Path, echo: Echo, loop: asyncio.AbstractEventLoop) -> None:
        self.path = str(path)
        self.echo = echo
        self.loop = loop

    def raw(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        connection.settimeout(30)
        return connection

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self.echo.release.set)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    echo = Echo()
    with serving(tmp_path / "socket", echo.interface(), connections=20, call_limit=1000) as loop:
        yield Served(tmp_path / "socket", echo, loop)
        loop.call_soon_threadsafe(echo.release.set)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for a condition that another thread brings about."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def replies(connection: socket.socket, count: int) -> list[dict[str, object]]:
    data = b""
    while data.count(b"\0") < count:
        piece = connection.recv(65536)
        assert piece, f"closed after {data!r}"
        data += piece
    *texts, rest = data.split(b"\0")
    assert rest == b""
    return [json.loads(text) for text in texts]


def at_end(connection: socket.socket) -> bytes:
    """Everything up to the end; a reset is an end too."""
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_info_and_descriptions(served: Served) -> None:
    with Connection(served.path) as connection:
        info = connection.call("org.varlink.service.GetInfo", {}, dict)
        assert info["vendor"] == "blksnap-ublk"
        assert set(info["interfaces"]) == {"org.varlink.service", "org.example.echo"}
        for interface, text in (("org.example.echo", DESCRIPTION), ("org.varlink.service", "method GetInfo()")):
            described = connection.call("org.varlink.service.GetInterfaceDescription", {"interface": interface}, dict)
            assert text in described["description"]


@pytest.mark.parametrize(
    ("method", "parameters", "error", "says"),
    [
        (PREFIX + "Nope", {}, "org.varlink.service.MethodNotFound", {"method": PREFIX + "Nope"}),
        ("org.nope.Echo", {}, "org.varlink.service.InterfaceNotFound", {"interface": "org.nope"}),
        ("Echo", {}, "org.varlink.service.InterfaceNotFound", {"interface": ""}),
        ("org.varlink.service.Nope", {}, "org.varlink.service.MethodNotFound", {"method": "org.varlink.service.Nope"}),
        (
            "org.varlink.service.GetInterfaceDescription",
            {"interface": "a.b"},
            "org.varlink.service.InterfaceNotFound",
            {"interface": "a.b"},
        ),
        (PREFIX + "Echo", {}, "org.varlink.service.InvalidParameter", {"parameter": "text"}),
        (PREFIX + "Echo", {"text": "a", "x": 1}, "org.varlink.service.InvalidParameter", {"parameter": "x"}),
        (PREFIX + "Count", {"to": 3}, "org.varlink.service.ExpectedMore", {}),
        (PREFIX + "Fail", {"kind": "varlink"}, PREFIX + "Refused", {"text": "as told"}),
        (PREFIX + "Fail", {"kind": "a bug"}, PREFIX + "Refused", {"text": "a bug"}),
        (PREFIX + "Fail", {"kind": "connection"}, PREFIX + "Refused", {"text": "some other connection"}),
        (PREFIX + "Fail", {"kind": "cancelled"}, PREFIX + "Refused", {"text": "the handler was cancelled"}),
    ],
)
def test_errors_leave_the_connection_usable(
    served: Served, method: str, parameters: dict[str, object], error: str, says: dict[str, object]
) -> None:
    with Connection(served.path) as connection:
        with pytest.raises(VarlinkError) as caught:
            connection.call(method, parameters, dict)
        assert (caught.value.name, caught.value.parameters) == (error, says)
        assert connection.usable()
        assert connection.call(PREFIX + "Echo", {"text": "still here"}, Text).text == "still here"


@pytest.mark.parametrize("kind", ["unsendable", "no-form"])
def test_a_result_that_cannot_be_sent_is_an_error_of_its_handler(served: Served, kind: str) -> None:
    with Connection(served.path) as connection:
        with pytest.raises(VarlinkError, match="Refused"):
            connection.call(PREFIX + "Fail", {"kind": kind}, dict)
        assert connection.usable()


def test_a_stream(served: Served) -> None:
    with Connection(served.path) as connection:
        numbers = [reply.number for reply in connection.stream(PREFIX + "Count", {"to": 2000}, Number)]
        assert numbers == list(range(1, 2001))
        assert connection.usable()


def test_more_on_a_method_with_one_reply(served: Served) -> None:
    with Connection(served.path) as connection:
        assert [reply.text for reply in connection.stream(PREFIX + "Echo", {"text": "a"}, Text)] == ["a"]


def test_a_stream_that_is_left_closes_its_connection(served: Served) -> None:
    with Connection(served.path) as connection:
        for reply in connection.stream(PREFIX + "Follow", {}, Number):
            assert reply.number == 0
            break
        assert connection.closed
        with pytest.raises(ConnectionLost):
            connection.call(PREFIX + "Echo", {"text": "a"}, Text)
    eventually(lambda: served.echo.following == 0)


def test_a_oneway_call_has_no_reply_not_even_an_error(served: Served) -> None:
    with Connection(served.path) as connection:
        connection.oneway(PREFIX + "Echo", {"text": "unheard"})
        connection.oneway(PREFIX + "Fail", {"kind": "varlink"})
        connection.oneway(PREFIX + "Nope", {})
        assert connection.call(PREFIX + "Echo", {"text": "heard"}, Text).text == "heard"
    assert served.echo.done == ["unheard", "heard"]


def test_calls_sent_at_once_are_answered_in_order(served: Served) -> None:
    with served.raw() as connection:
        connection.sendall(b"".join(wire.encode_call(PREFIX + "Echo", {"text": str(n)}) for n in range(100)))
        assert [reply["parameters"] for reply in replies(connection, 100)] == [{"text": str(n)} for n in range(100)]


def test_null_parameters_are_none(served: Served) -> None:
    with served.raw() as connection:
        connection.sendall(b'{"method":"org.varlink.service.GetInfo","parameters":null,"more":null}\0')
        assert "parameters" in replies(connection, 1)[0]


def test_a_call_cut_at_every_byte(served: Served) -> None:
    with served.raw() as connection:
        for byte in wire.encode_call(PREFIX + "Echo", {"text": "é"}):
            connection.sendall(bytes([byte]))
        assert replies(connection, 1) == [{"parameters": {"text": "é"}}]


@pytest.mark.parametrize(
    "garbage", [b"\0", b"hello\0", b"[]\0", b'{"method":7}\0', b"x" * 1001, b'{"method":"' + b"[" * 5000, b"\xff\0"]
)
def test_a_malformed_message_ends_its_connection_and_no_other(served: Served, garbage: bytes) -> None:
    with Connection(served.path) as other, served.raw() as connection:
        connection.sendall(wire.encode_call(PREFIX + "Echo", {"text": "before"}) + garbage)
        answered = at_end(connection)
        assert answered in (b'{"parameters":{"text":"before"}}\0', b"")
        assert other.call(PREFIX + "Echo", {"text": "after"}, Text).text == "after"
    assert served.echo.done == ["before", "after"]


def test_the_longest_call_that_is_allowed(served: Served) -> None:
    frame = len(wire.encode_call(PREFIX + "Echo", {"text": ""})) - 1
    with Connection(served.path) as connection:
        text = "a" * (1000 - frame)
        assert connection.call(PREFIX + "Echo", {"text": text}, Text).text == text
        with pytest.raises(ConnectionLost):
            connection.call(PREFIX + "Echo", {"text": text + "a"}, Text)


def test_a_caller_that_goes_does_not_stop_its_call(served: Served) -> None:
    connection = served.raw()
    connection.sendall(wire.encode_call(PREFIX + "Wait", {}))
    eventually(lambda: served.echo.waiting == 1)
    connection.close()
    time.sleep(0.05)
    assert served.echo.waiting == 1
    served.release()
    eventually(lambda: served.echo.done == ["waited"])


def test_a_stream_ends_when_its_caller_goes(served: Served) -> None:
    connection = served.raw()
    connection.sendall(wire.encode_call(PREFIX + "Follow", {}, more=True))
    replies(connection, 1)
    assert served.echo.following == 1
    connection.close()
    eventually(lambda: served.echo.following == 0)


def test_a_caller_that_only_stops_sending_gets_its_answers(served: Served) -> None:
    with served.raw() as connection:
        connection.sendall(
            wire.encode_call(PREFIX + "Wait", {}) + wire.encode_call(PREFIX + "Count", {"to": 3}, more=True)
        )
        connection.shutdown(socket.SHUT_WR)
        eventually(lambda: served.echo.waiting == 1)
        served.release()
        assert at_end(connection).count(b"\0") == 4


def test_a_stream_ends_when_a_half_closed_caller_goes(served: Served) -> None:
    connection = served.raw()
    connection.sendall(wire.encode_call(PREFIX + "Follow", {}, more=True))
    connection.shutdown(socket.SHUT_WR)
    replies(connection, 1)
    connection.close()
    eventually(lambda: served.echo.following == 0)


def test_one_that_waits_does_not_hold_up_others(served: Served) -> None:
    with served.raw() as waiting, Connection(served.path) as other:
        waiting.sendall(wire.encode_call(PREFIX + "Wait", {}))
        eventually(lambda: served.echo.waiting == 1)
        assert other.call(PREFIX + "Echo", {"text": "meanwhile"}, Text).text == "meanwhile"
        served.release()
        assert replies(waiting, 1) == [{"parameters": {"text": "waited"}}]


def test_one_that_does_not_read_does_not_hold_up_others(served: Served) -> None:
    with served.raw() as slow, Connection(served.path) as other:
        slow.sendall(wire.encode_call(PREFIX + "Count", {"to": 200_000}, more=True))
        for number in range(50):
            assert other.call(PREFIX + "Echo", {"text": str(number)}, Text).text == str(number)
        data = b""
        while data.count(b"\0") < 200_000:
            data += slow.recv(1 << 20)
        assert data.endswith(b'{"parameters":{"number":200000}}\0')


def test_many_at_the_same_time(served: Served) -> None:
    failures = []

    def one(number: int) -> None:
        try:
            with Connection(served.path) as connection:
                for turn in range(20):
                    text = f"{number} {turn}"
                    assert connection.call(PREFIX + "Echo", {"text": text}, Text).text == text
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_more_connections_than_allowed_are_closed(served: Served) -> None:
    held = [served.raw() for _ in range(20)]
    for connection in held:
        connection.sendall(wire.encode_call(PREFIX + "Echo", {"text": "a"}))
        replies(connection, 1)
    with served.raw() as one_too_many:
        assert at_end(one_too_many) == b""
    held.pop().close()

    def accepted() -> bool:
        with served.raw() as connection:
            try:
                connection.sendall(wire.encode_call(PREFIX + "Echo", {"text": "b"}))
            except BrokenPipeError:
                return False
            return at_first(connection) == b'{"parameters":{"text":"b"}}\0'

    eventually(accepted)
    for connection in held:
        connection.close()


def at_first(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60) | st.sampled_from([b"\0", b'{"method":"', b'"}', b"{}"]), max_size=6))
def test_the_server_outlives_any_bytes(served: Served, pieces: list[bytes]) -> None:
    with served.raw() as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        at_end(connection)
    with Connection(served.path) as connection2:
        assert connection2.call(PREFIX + "Echo", {"text": "alive"}, Text).text == "alive"


def test_at_its_end_the_server_finishes_calls_and_cancels_streams(tmp_path: Path) -> None:
    echo = Echo()
    path = tmp_path / "socket"
    answers: list[object] = []

    def wait() -> None:
        with Connection(str(path)) as connection:
            answers.append(connection.call(PREFIX + "Wait", {}, Text).text)

    def follow() -> None:
        with Connection(str(path)) as connection:
            try:
                for reply in connection.stream(PREFIX + "Follow", {}, Number):
                    answers.append(reply.number)
            except ConnectionLost:
                answers.append("ended")

    threads = [threading.Thread(target=wait), threading.Thread(target=follow)]
    with serving(path, echo.interface()) as loop:
        for thread in threads:
            thread.start()
        eventually(lambda: echo.waiting == 1 and 0 in answers)
        # Idle and unread connections do not hold the end up either.
        idle = socket.socket(socket.AF_UNIX)
        idle.connect(str(path))
        loop.call_soon_threadsafe(loop.call_later, 0.2, echo.release.set)
    for thread in threads:
        thread.join(30)
    idle.close()
    assert sorted(map(str, answers)) == ["0", "ended", "waited"]


def test_at_its_end_the_server_refuses_what_it_has_not_begun(tmp_path: Path) -> None:
    """In words that tell the caller to ask another one; what it has not read is reset by the kernel."""
    echo = Echo()
    path = tmp_path / "socket"
    with serving(path, echo.interface()) as loop:
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(str(path))
        peer.sendall(wire.encode_call(PREFIX + "Wait", {}) + wire.encode_call(PREFIX + "Echo", {"text": "a"}))
        eventually(lambda: echo.waiting == 1)
        loop.call_soon_threadsafe(loop.call_later, 0.2, echo.release.set)
    received = b""
    while data := peer.recv(1000):
        received += data
    peer.close()
    assert [message.error for message in map(wire.decode_reply, received.split(b"\0")[:-1])] == [None, wire.NOT_BEGUN]
    assert echo.done == ["waited"]


def test_a_call_that_was_not_begun_is_told_from_one_that_was(tmp_path: Path) -> None:
    """Many callers while servers come and go: each call was done once, or its caller knows that it was not."""
    path = tmp_path / "socket"
    done: list[str] = []
    asked: list[str] = []
    over = threading.Event()

    def ask(name: int) -> None:
        for number in itertools.count():
            text = f"{name}-{number}"
            while not over.is_set():
                try:
                    with Connection(str(path)) as connection:
                        connection.call(PREFIX + "Echo", {"text": text}, Text)
                    asked.append(text)
                    break
                except (CallUnread, FileNotFoundError, ConnectionRefusedError):
                    continue
            if over.is_set():
                return

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        echo = Echo()
        with serving(path, echo.interface()):
            eventually(lambda: len(echo.done) >= 20)  # noqa: B023
        path.unlink()
        done += echo.done
    over.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(done) == len(set(done))
    assert set(asked) <= set(done)
    assert len(done) - len(asked) <= len(threads)  # whose answer nobody waited for, at the end of all


def test_a_reply_that_nobody_reads_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FLUSH_SECONDS", 0.2)
    echo = Echo()
    with serving(tmp_path / "socket", echo.interface()):
        slow = socket.socket(socket.AF_UNIX)
        slow.connect(str(tmp_path / "socket"))
        slow.sendall(wire.encode_call(PREFIX + "Count", {"to": 100_000}, more=True))
        slow.recv(1)
    slow.close()


def test_only_root_and_the_user_itself_may_call(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    path = tmp_path / "socket"
    program = f"""
import os, socket
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
s = socket.socket(socket.AF_UNIX)
s.settimeout(30)
s.connect({str(path)!r})
os.write(1, s.recv(1000))
"""
    with serving(path, Echo().interface()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o666)
        for directory in (tmp_path, *tmp_path.parents):
            if directory != Path("/tmp"):
                directory.chmod(directory.stat().st_mode | 0o011)
        said = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
        assert said.stdout == b'{"parameters":{},"error":"org.varlink.service.PermissionDenied"}\0'


@pytest.mark.parametrize(
    "answer", [b"", b"nonsense\0", b'{"parameters":{"text":1}}\0', b'{"error":"a.b","parameters":[]}\0', b"x" * 2000]
)
def test_a_caller_of_a_broken_service(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()

        def serve() -> None:
            accepted, _ = listening.accept()
            accepted.recv(1000)
            accepted.sendall(answer)
            accepted.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with Connection(str(tmp_path / "socket"), reply_limit=1000) as connection:
            with pytest.raises(ConnectionLost):
                connection.call("a.b.C", {}, Text)
            assert connection.closed
        thread.join()


def test_a_text_that_json_cannot_carry_is_refused_before_it_is_sent(served: Served) -> None:
    with Connection(served.path) as connection:
        with pytest.raises(UnicodeEncodeError):
            connection.call(PREFIX + "Echo", {"text": os.fsdecode(b"\xff")}, Text)
        assert connection.call(PREFIX + "Echo", {"text": "a"}, Text).text == "a"


def test_the_connection_notices_that_the_service_went(tmp_path: Path) -> None:
    with serving(tmp_path / "socket", Echo().interface()):
        connection = Connection(str(tmp_path / "socket"))
        assert connection.usable()
    assert not connection.usable()
    connection.close()
    assert not connection.usable()


def test_replies_may_have_fields_that_the_caller_does_not_know(served: Served) -> None:
    class Less(msgspec.Struct):
        pass

    with Connection(served.path) as connection:
        assert isinstance(connection.call(PREFIX + "Echo", {"text": "a"}, Less), Less)
