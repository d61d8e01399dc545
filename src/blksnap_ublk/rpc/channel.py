# SPDX-License-Identifier: MIT
"""One connected SOCK_SEQPACKET socket: datagrams with descriptors, whole or not at all."""

import array
import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from blksnap_ublk.rpc.descriptors import Descriptors

MESSAGE_LIMIT = 1 << 20
DESCRIPTOR_LIMIT = 253  # SCM_MAX_FD of the kernel

# What msgspec raises for text that is not JSON, not UTF-8, of another type, or nested too deeply.
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_SO_SNDBUFFORCE = 32  # of asm-generic/socket.h; Python has no name for it
_INT = array.array("i").itemsize


class Malformed(Exception):
    """A datagram that cannot be taken as a message; its descriptors are closed."""


@dataclass(frozen=True)
class Datagram:
    """What was received. The receiver closes `descriptors`."""

    payload: bytes
    descriptors: Descriptors


class Channel:
    """Sends and receives datagrams of at most `limit` bytes over `connection`, which it owns from now on."""

    def __init__(self, connection: socket.socket, limit: int = MESSAGE_LIMIT) -> None:
        self._socket = connection
        self._buffer = bytearray(limit)
        self._limit = limit
        _raise_send_buffer(connection, limit)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send one datagram; the descriptors stay the caller's.

        Raises OSError: EMSGSIZE when it is too large for a datagram, EPIPE when the peer is gone, EAGAIN when the
        socket does not wait and the peer does not read.
        """
        if len(payload) > self._limit:
            raise OSError(errno.EMSGSIZE, f"a message of {len(payload)} bytes; at most {self._limit} fit")
        if len(descriptors) > DESCRIPTOR_LIMIT:
            raise OSError(errno.EMSGSIZE, f"{len(descriptors)} descriptors; a message has {DESCRIPTOR_LIMIT} at most")
        control = []
        if descriptors:
            control.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes()))
        self._socket.sendmsg([payload], control, socket.MSG_NOSIGNAL)

    def receive(self) -> Datagram | None:
        """The next datagram, None when the peer has closed the connection.

        Raises Malformed for one that was cut, in its bytes or in its descriptors, and OSError.
        """
        room = socket.CMSG_SPACE(DESCRIPTOR_LIMIT * _INT)
        size, control, flags, _ = self._socket.recvmsg_into([self._buffer], room, socket.MSG_CMSG_CLOEXEC)
        descriptors = Descriptors(_received(control))
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            descriptors.close()
            raise Malformed(f"a message of more than {self._limit} bytes, or more descriptors than can be opened")
        if size == 0:
            descriptors.close()
            return None
        return Datagram(bytes(self._buffer[:size]), descriptors)

    def wait_limit(self, seconds: float | None) -> None:
        """Let `send` and `receive` wait that long at most (TimeoutError); None: without limit; 0: not at all."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Close the connection. May be called again."""
        self._socket.close()


def _received(control: list[tuple[int, int, bytes]]) -> list[int]:
    numbers = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % _INT])
    return numbers.tolist()


def _raise_send_buffer(connection: socket.socket, size: int) -> None:
    # The kernel doubles what it is given and refuses a datagram that does not fit in the buffer.
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size)
    except OSError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


def listen(path: str | os.PathLike[str], kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> socket.socket:
    """A listening Unix socket at `path`, mode 0600, in place of one that is there already. Raises OSError.

    It is bound under another name and renamed, so that nobody finds a socket that does not listen yet. Only the holder
    of the directory's lock may call it.
    """
    name = os.fspath(path)
    unready = f"{name}.{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(unready)
        try:
            listener.listen(64)
            os.rename(unready, name)
        except BaseException:
            os.unlink(unready)
            raise
    except BaseException:
        listener.close()
        raise
    return listener
