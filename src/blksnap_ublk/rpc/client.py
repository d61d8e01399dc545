# SPDX-License-Identifier: MIT
"""The asking half of a call: send a message, wait for its answer."""

import errno
import os
import socket
import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from blksnap_ublk.rpc.channel import DECODE_ERRORS, MESSAGE_LIMIT, Channel, Malformed
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.rpc.peer import peer_of

A = TypeVar("A")


class Client(Generic[A]):
    """A connection on which any thread may call; calls of several threads go one after another.

    After a call that got no proper answer the connection is closed, because a late answer could be taken for that of
    the next call: all later calls raise OSError(ENOTCONN).
    """

    def __init__(self, path: str | os.PathLike[str], answer: type[A], limit: int = MESSAGE_LIMIT) -> None:
        """Connect to the socket at `path`. Raises OSError; EPERM when neither root nor our own user listens there."""
        self._path = os.fspath(path)
        self._decoder: msgspec.json.Decoder[A] = msgspec.json.Decoder(answer)
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connection.connect(self._path)
            peer = peer_of(connection)
            if not peer.trusted:
                raise OSError(errno.EPERM, f"user {peer.uid} listens there, not root", self._path)
            self._channel: Channel | None = Channel(connection, limit)
        except BaseException:
            connection.close()
            raise

    @property
    def connected(self) -> bool:
        """False once the connection is closed, by us or after a call that failed."""
        return self._channel is not None

    def fileno(self) -> int:
        """The socket, for a loop that wants to know when the peer goes away: it is readable then. -1 when closed."""
        return -1 if self._channel is None else self._channel.fileno()

    def call(
        self, message: msgspec.Struct, descriptors: Sequence[int] = (), timeout: float | None = None
    ) -> tuple[A, Descriptors]:
        """Send `message` with `descriptors`, which stay the caller's; wait at most `timeout` seconds for the answer.

        The caller closes the answer's descriptors. Raises OSError: TimeoutError, ConnectionResetError when the peer
        went away, EBADMSG for an answer that is none, EMSGSIZE (nothing was sent, the connection stays).
        """
        with self._lock:
            channel = self._channel
            if channel is None:
                raise OSError(errno.ENOTCONN, "the connection is closed", self._path)
            try:
                channel.wait_limit(timeout)
                channel.send(self._encoder.encode(message), descriptors)
                return self._answer(channel)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    self._close()
                raise
            except BaseException:
                self._close()
                raise

    def _answer(self, channel: Channel) -> tuple[A, Descriptors]:
        try:
            datagram = channel.receive()
            if datagram is None:
                raise ConnectionResetError(errno.ECONNRESET, "the other process went away", self._path)
            try:
                return self._decoder.decode(datagram.payload), datagram.descriptors
            except BaseException:
                datagram.descriptors.close()
                raise
        except (Malformed, *DECODE_ERRORS) as error:
            raise OSError(errno.EBADMSG, f"not an answer: {error}", self._path) from error

    def close(self) -> None:
        """Close the connection, after the call that is under way. May be called again."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
