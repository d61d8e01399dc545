# SPDX-License-Identifier: MIT
"""The answering half of a call: many connections, one message at a time."""

import errno
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import msgspec

from blksnap_ublk.rpc.channel import DECODE_ERRORS, MESSAGE_LIMIT, Channel, Malformed
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.rpc.loop import Loop
from blksnap_ublk.rpc.peer import Peer, peer_of

log = logging.getLogger(__name__)

M = TypeVar("M")


@dataclass(frozen=True)
class Reply:
    """An answer, with descriptors that stay the sender's (not those of the message, which are closed before)."""

    answer: msgspec.Struct
    descriptors: Sequence[int] = ()


class Server(Generic[M]):
    """Answers each message with exactly one reply.

    `handle(message, descriptors)` makes the reply; descriptors that it does not take are closed before that is sent.
    `refuse(error)` makes the answer to an OSError that `handle` raises, and to what is no message (EBADMSG), after
    which the connection is closed. Peers that are neither root nor our own user are turned away.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        message: type[M],
        handle: Callable[[M, Descriptors], Reply],
        refuse: Callable[[OSError], msgspec.Struct],
        limit: int = MESSAGE_LIMIT,
    ) -> None:
        """`listener` becomes the server's. `message` is a tagged union of msgspec Structs."""
        self._loop = loop
        self._listener = listener
        self._decoder: msgspec.json.Decoder[M] = msgspec.json.Decoder(message)
        self._encoder = msgspec.json.Encoder()
        self._handle = handle
        self._refuse = refuse
        self._limit = limit
        self._channels: dict[Channel, Peer] = {}
        listener.setblocking(False)
        loop.watch(listener, self._accept)

    def close(self) -> None:
        """Close the listening socket and all connections."""
        for channel in list(self._channels):
            self._drop(channel)
        self._loop.unwatch(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                log.warning("a connection could not be accepted: %s", error)
            return
        try:
            peer = peer_of(connection)
            if not peer.trusted:
                raise PermissionError(errno.EPERM, f"process {peer.pid} of user {peer.uid} is not root")
            channel = Channel(connection, self._limit)
            channel.wait_limit(0)
        except OSError as error:
            log.warning("a connection was turned away: %s", error)
            connection.close()
            return
        self._channels[channel] = peer
        self._loop.watch(channel, partial(self._serve, channel))

    def _serve(self, channel: Channel) -> None:
        try:
            datagram = channel.receive()
        except BlockingIOError:
            return
        except Malformed as error:
            self._reject(channel, str(error))
            return
        except OSError:
            self._drop(channel)
            return
        if datagram is None:
            self._drop(channel)
            return
        # Closed before the answer: whoever has it may count on an exclusive open being gone where it was not taken.
        with datagram.descriptors as descriptors:
            try:
                message = self._decoder.decode(datagram.payload)
            except DECODE_ERRORS as error:
                reply, malformed = None, f"not a message: {error}"
            else:
                reply = self._answer(message, descriptors)
        if reply is None:
            self._reject(channel, malformed)
        else:
            self._send(channel, reply)

    def _answer(self, message: M, descriptors: Descriptors) -> Reply:
        try:
            return self._handle(message, descriptors)
        except OSError as error:
            return Reply(self._refuse(error))
        except Exception as error:
            log.exception("%s failed", type(message).__name__)
            return Reply(self._refuse(OSError(errno.EIO, f"internal error: {type(error).__name__}: {error}")))

    def _reject(self, channel: Channel, text: str) -> None:
        peer = self._channels[channel]
        log.warning("process %d sent %s", peer.pid, text)
        if self._send(channel, Reply(self._refuse(OSError(errno.EBADMSG, text)))):
            self._drop(channel)

    def _send(self, channel: Channel, reply: Reply) -> bool:
        # A peer that does not read its answers has no right to make others wait: it is dropped.
        try:
            try:
                channel.send(self._encoder.encode(reply.answer), reply.descriptors)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                channel.send(self._encoder.encode(self._refuse(error)))
            return True
        except OSError as error:
            log.info("process %d went away before its answer: %s", self._channels[channel].pid, error)
            self._drop(channel)
            return False

    def _drop(self, channel: Channel) -> None:
        del self._channels[channel]
        self._loop.unwatch(channel)
        channel.close()
