# SPDX-License-Identifier: MIT
"""A varlink server on asyncio: accepts, checks who calls, and serves each connection in a task of its own."""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Sequence

from blksnap_ublk.varlink import wire
from blksnap_ublk.varlink.interface import Interface
from blksnap_ublk.varlink.introspection import Info, introspection
from blksnap_ublk.varlink.served import ServedConnection

CONNECTIONS = 256
FLUSH_SECONDS = 5.0
RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


class Server:
    """Serves `interfaces` on a listening socket.

    Only root and the server's own user may call. Calls of one connection are answered in their order, those of
    different connections at the same time. `connections` more than that many are closed as they come.
    """

    def __init__(
        self,
        info: Info,
        interfaces: Sequence[Interface],
        *,
        connections: int = CONNECTIONS,
        call_limit: int = wire.CALL_LIMIT,
    ) -> None:
        served = {interface.name: interface for interface in interfaces}
        self._interfaces = served | {wire.SERVICE: introspection(info, served)}
        self._users = {0, os.geteuid()}
        self._limit = connections
        self._call_limit = call_limit
        self._served: dict[ServedConnection, asyncio.Task[None]] = {}
        self._listening: socket.socket | None = None

    def start(self, listening: socket.socket) -> None:
        """Serve what comes in on `listening`, a listening Unix stream socket, until `close`. Call it in the loop.

        The socket stays the caller's, who closes it.
        """
        listening.setblocking(False)
        self._listening = listening
        self._accept_more()

    async def close(self) -> None:
        """End: accept nothing, cancel streams, let every other handler run to its end and its reply go out."""
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening)
            self._listening = None
        for served in self._served:
            served.stop()
        handlers = [served.handler for served in self._served if served.handler is not None]
        if handlers:
            await asyncio.wait(handlers)
        tasks = list(self._served.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=FLUSH_SECONDS)
            if late:
                for served in self._served:
                    served.abort()
                await asyncio.wait(late)

    def _accept_more(self) -> None:
        if self._listening is not None:
            asyncio.get_running_loop().add_reader(self._listening, self._accept, self._listening)

    def _accept(self, listening: socket.socket) -> None:
        try:
            peer, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("a connection cannot be accepted: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listening)
            loop.call_later(RETRY_SECONDS, self._accept_more)
            return
        peer.setblocking(False)
        self._admit(peer)

    def _admit(self, peer: socket.socket) -> None:
        if _user_of(peer) not in self._users:
            with contextlib.suppress(OSError):
                peer.send(wire.encode_error(wire.permission_denied()))
            peer.close()
        elif len(self._served) >= self._limit:
            log.warning("a connection is refused: there are %d already", self._limit)
            peer.close()
        else:
            served = ServedConnection(peer, self._interfaces, self._call_limit)
            task = asyncio.create_task(served.run())
            self._served[served] = task
            task.add_done_callback(lambda _: self._served.pop(served))


def _user_of(peer: socket.socket) -> int:
    credentials = struct.Struct("3i")
    _pid, user, _group = credentials.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    return int(user)
