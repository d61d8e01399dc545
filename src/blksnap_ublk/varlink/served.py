# SPDX-License-Identifier: MIT
"""One connection of a varlink server: reads calls, runs their handlers one after another, writes the replies."""

import asyncio
import contextlib
import logging
import select
import socket
from collections.abc import Mapping
from typing import Any, TypeVar

from blksnap_ublk.varlink import wire
from blksnap_ublk.varlink.interface import Interface, Method, decode_parameters
from blksnap_ublk.varlink.wire import CallMessage, MalformedMessage, VarlinkError

READ_SIZE = 1 << 16
CALLS_AHEAD = 16
HALF_CLOSED_POLL_SECONDS = 1.0

log = logging.getLogger(__name__)

T = TypeVar("T")


class CallerGone(Exception):
    """The caller closed its connection."""


class ServedConnection:
    """Serves one caller until it goes, sends what is no call, or `stop`."""

    def __init__(self, peer: socket.socket, interfaces: Mapping[str, Interface], call_limit: int) -> None:
        self._peer = peer
        self._writer: asyncio.StreamWriter | None = None
        self._interfaces = interfaces
        self._splitter = wire.MessageSplitter(call_limit)
        self._calls: asyncio.Queue[CallMessage | None] = asyncio.Queue(CALLS_AHEAD)
        self._ended = asyncio.Event()
        self.handler: asyncio.Task[bytes] | None = None

    def stop(self) -> None:
        """Serve nothing after the call that is being served; cancel that too if it is a stream.

        Calls that were read are refused, so that whoever made them knows that they were not begun; what was not read is
        left for the kernel to tell.
        """
        if self._writer is not None:
            self._writer.transport.pause_reading()  # type: ignore[attr-defined]
        self._ended.set()

    def abort(self) -> None:
        """Throw away what the caller has not read, and end."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def run(self) -> None:
        """Serve. Never raises."""
        reader, writer = await asyncio.open_unix_connection(sock=self._peer)
        self._writer = writer
        reading = asyncio.create_task(self._read(reader))
        try:
            while (call := await self._next_call()) is not None:
                reply = wire.encode_error(wire.not_begun()) if self._ended.is_set() else await self._answer(call)
                if reply is not None and not call.oneway:
                    await self.write(reply)
        except CallerGone:
            pass
        finally:
            reading.cancel()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _next_call(self) -> CallMessage | None:
        """None at the end: of what the caller sends, or after `stop` of what was read of it."""
        getting = asyncio.create_task(self._calls.get())
        call = await self._unless_ended(getting)
        if call is None and not getting.cancelled():
            call = getting.result()
        if call is None and self._ended.is_set():
            await asyncio.sleep(0)  # for `_read`, which may have been given the last of it just now
            call = None if self._calls.empty() else self._calls.get_nowait()
        return call

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(READ_SIZE):
                for message in self._splitter.feed(data):
                    await self._calls.put(wire.decode_call(message))
        except MalformedMessage as error:
            log.warning("a caller is cut off: %s", error)
        except OSError:
            self._ended.set()
        await self._calls.put(None)
        # A caller may end its sending side and still read; it is gone when both sides are closed.
        while not self._hung_up():
            await asyncio.sleep(HALF_CLOSED_POLL_SECONDS)
        self._ended.set()

    def _hung_up(self) -> bool:
        if self._peer.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._peer, 0)
        return bool(poll.poll(0))

    async def _answer(self, message: CallMessage) -> bytes | None:
        try:
            interface, method = self._find(message.method)
            parameters = decode_parameters(message.parameters, method.parameters)
            return await self._handle(interface, method, parameters, message)
        except VarlinkError as error:
            return wire.encode_error(error)

    def _find(self, name: str) -> tuple[Interface, Method[Any]]:
        interface_name, _, method_name = name.rpartition(".")
        interface = self._interfaces.get(interface_name)
        if interface is None:
            raise wire.interface_not_found(interface_name)
        method = interface.methods.get(method_name)
        if method is None:
            raise wire.method_not_found(name)
        return interface, method

    async def _handle(
        self, interface: Interface, method: Method[Any], parameters: object, message: CallMessage
    ) -> bytes | None:
        """Run the handler; its last reply as it travels, or None when it was cancelled."""
        call = _ServedCall(self, more=bool(message.more) and not message.oneway)

        async def handle() -> bytes:
            return wire.encode_reply(await method.handler(parameters, call))

        self.handler = asyncio.create_task(handle())
        try:
            if method.stream:
                return await self._unless_ended(self.handler)
            await asyncio.wait({self.handler})
            if self.handler.cancelled():
                raise RuntimeError("the handler was cancelled")
            return self.handler.result()
        except (VarlinkError, CallerGone):
            raise
        except Exception as error:
            raise interface.to_error(error) from error
        finally:
            self.handler = None

    async def _unless_ended(self, task: "asyncio.Task[T]") -> T | None:
        """The result of `task`; or None, and the task cancelled, when the connection is to end first."""
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not self._ended.is_set():
                return task.result()
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()
            return None
        finally:
            ended.cancel()

    async def write(self, data: bytes) -> None:
        """Write `data` as fast as the caller reads. Raises CallerGone."""
        assert self._writer is not None
        self._writer.write(data)
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise CallerGone from error


class _ServedCall:
    """The Call that a handler gets."""

    def __init__(self, connection: ServedConnection, *, more: bool) -> None:
        self.more = more
        self._connection = connection

    async def send(self, reply: object) -> None:
        """Send a reply that is not the last one."""
        if not self.more:
            raise wire.expected_more()
        await self._connection.write(wire.encode_reply(reply, continues=True))
