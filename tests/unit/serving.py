# SPDX-License-Identifier: MIT
"""A varlink server for tests, on a real socket, in a thread of its own."""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blksnap_ublk.daemon.interface import ublk_interface
from blksnap_ublk.daemon.service import Service
from blksnap_ublk.varlink.interface import Interface
from blksnap_ublk.varlink.introspection import Info
from blksnap_ublk.varlink.server import Server

INFO = Info(vendor="blksnap-ublk", product="tests", version="1", url="")


@contextmanager
def serving(
    path: Path, *interfaces: Interface, connections: int = 256, call_limit: int = 1 << 20
) -> Iterator[asyncio.AbstractEventLoop]:
    """Serve `interfaces` on `path` while the block runs; the loop in which the handlers run."""
    ready = threading.Event()
    ended = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            os.fchmod(listening.fileno(), 0o600)
            listening.bind(str(path))
            listening.listen()
            server = Server(INFO, interfaces, connections=connections, call_limit=call_limit)
            server.start(listening)
            ready.set()
            await ended.wait()
            await server.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        yield loop
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(60)
        alive = thread.is_alive()
        if not alive:
            assert asyncio.all_tasks(loop) == set(), "the server left tasks behind"
            loop.close()
        assert not alive, "the server does not end"


@contextmanager
def serving_ublk(path: Path, service: Service) -> Iterator[asyncio.AbstractEventLoop]:
    """Serve `io.blksnap.Ublk` for `service`."""
    with serving(path, ublk_interface(service)) as loop:
        yield loop
