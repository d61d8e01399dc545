# SPDX-License-Identifier: MIT
"""The calling side of varlink, for ordinary (blocking) code."""

import select
import socket
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import TypeVar

import msgspec

from blksnap_ublk.varlink import wire
from blksnap_ublk.varlink.wire import MalformedMessage, ReplyMessage, VarlinkError

READ_SIZE = 1 << 18

R = TypeVar("R")


class ConnectionLost(ConnectionError):
    """The service ended the connection, or said what is no varlink reply."""


class CallUnread(ConnectionLost):
    """The connection ended before the service began with the call: it was not done, and may be made again.

    The service says so where it has read it. Of what it has not read the kernel tells: a Unix socket that is closed
    with unread data resets its peer (ECONNRESET, unix(7)), also one that nobody has accepted yet; one that was closed
    before refuses what is sent (EPIPE).
    """


class Connection:
    """A connection to the service that listens on the Unix socket `path`. For one thread at a time.

    After anything but a VarlinkError the connection is closed: nobody can tell what an answer would belong to.
    Raises OSError when nobody listens.
    """

    def __init__(self, path: str, *, reply_limit: int = wire.REPLY_LIMIT) -> None:
        self._splitter = wire.MessageSplitter(reply_limit)
        self._replies: deque[bytes] = deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._refused = self._answered = False  # what was sent; something, since then
        self.closed = False
        try:
            self._socket.connect(path)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, parameters: object, reply: type[R]) -> R:
        """Call `method` (qualified name) and wait for its one reply.

        Raises VarlinkError, ConnectionLost, of these CallUnread where the call was certainly not done, or
        UnicodeEncodeError for text that JSON cannot carry.
        """
        message = wire.encode_call(method, parameters)
        try:
            self._send(message)
            return self._decode(self._receive(), reply)
        except VarlinkError:
            raise
        except BaseException:
            self.close()
            raise

    def stream(self, method: str, parameters: object, reply: type[R]) -> Iterator[R]:
        """Call `method` with `more` and yield its replies. A stream that is left before its end closes the connection.

        Raises as `call` does.
        """
        message = wire.encode_call(method, parameters, more=True)
        finished = False
        try:
            self._send(message)
            while not finished:
                received = self._receive()
                finished = not received.continues
                yield self._decode(received, reply)
        except VarlinkError:
            finished = True
            raise
        finally:
            if not finished:
                self.close()

    def oneway(self, method: str, parameters: object) -> None:
        """Call `method` and want no reply. Raises ConnectionLost."""
        message = wire.encode_call(method, parameters, oneway=True)
        try:
            self._send(message)
        except BaseException:
            self.close()
            raise

    def usable(self) -> bool:
        """Whether another call can be sent: the connection is open on both sides and nothing unasked came in."""
        if self.closed:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Close; calls that run on the other side do not notice."""
        self.closed = True
        self._socket.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, message: bytes) -> None:
        if self.closed:
            raise ConnectionLost("the connection is closed")
        self._refused = self._answered = False
        # What the service said before it hung up can still be read, and says more than these errors.
        try:
            self._socket.sendall(message)
        except (BrokenPipeError, ConnectionResetError):
            self._refused = True

    def _receive(self) -> ReplyMessage:
        try:
            while not self._replies:
                data = self._socket.recv(READ_SIZE)
                if not data:
                    kind = CallUnread if self._refused and not self._answered else ConnectionLost
                    raise kind("the service closed the connection")
                self._answered = True
                self._replies.extend(self._splitter.feed(data))
            return wire.decode_reply(self._replies.popleft())
        except ConnectionLost:
            raise
        except ConnectionResetError as error:
            raise (ConnectionLost if self._answered else CallUnread)(str(error)) from error
        except (MalformedMessage, ConnectionError) as error:
            raise ConnectionLost(str(error)) from error

    def _decode(self, received: ReplyMessage, reply: type[R]) -> R:
        raw = bytes(received.parameters)
        text = raw if raw not in (b"", b"null") else b"{}"
        try:
            if received.error == wire.NOT_BEGUN:
                raise CallUnread("the service ends")
            if received.error is not None:
                raise VarlinkError(received.error, msgspec.json.decode(text, type=dict[str, object]))
            return msgspec.json.decode(text, type=reply)
        except wire.DECODE_ERRORS as error:
            raise ConnectionLost(f"the reply has another form: {error}") from error
