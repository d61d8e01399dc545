# SPDX-License-Identifier: MIT
"""The connection to the io process, which may die and come back at any time."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from blksnap_ublk.errors import Failed, errno_symbol
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoClient, IoRefused

_CALL_LIMIT = 60.0  # seconds; the io process answers at once but for opening /dev/ublkcN and draining writes
_END_LIMIT = 60.0  # seconds for requests in flight to end
_CONNECT_AGAIN = 0.02  # seconds between two attempts to reach a new io process
_START_LIMIT = 60.0  # seconds for a new io process to come up


class IoLink:
    """Calls of any thread to the io process, one after another. Nothing is sent to an io process that replaced another
    before `connect()` was called: whoever does that makes the new one what the old one was.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._lock = threading.Lock()
        self._client: IoClient | None = None
        self._pid = 0
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def pid(self) -> int:
        """The io process that `connect()` met; what START_DEV wants to know."""
        return self._pid

    def connect(self) -> messages.Inventory:
        """Connects, to a new process after `lost`, and asks what it holds. Raises Failed."""
        end = time.monotonic() + _START_LIMIT
        while True:
            self.close()
            try:
                client = IoClient(self._socket)
                with self._lock:
                    self._client = client
                inventory = self.call(messages.Hello(messages.VERSION), [self._bell]).inventory
                break
            except IoRefused as error:
                raise Failed(f"the io process refuses to talk: {error.strerror}", advice="restart the daemon") from None
            except (OSError, Failed) as error:
                if time.monotonic() > end:
                    raise Failed(f"the io process does not answer: {error}", advice="see the daemon's log") from None
                time.sleep(_CONNECT_AGAIN)
        if inventory is None or inventory.version != messages.VERSION:
            raise Failed("the io process is of another version", advice="detach all devices and restart the daemon")
        self._pid = inventory.pid
        return inventory

    def call(self, message: messages.Message, descriptors: Sequence[int] = ()) -> messages.Done:
        """Sends one message and waits for its answer.

        Raises IoRefused, after which nothing has changed there, or Failed when the io process has gone.
        """
        with self._lock:
            client = self._client
        if client is None:
            raise _gone(None)
        try:
            return client.call(message, descriptors, timeout=_CALL_LIMIT)
        except IoRefused:
            raise
        except OSError as error:
            raise _gone(error) from None

    def end(self, message: messages.Message, seconds: float = _END_LIMIT) -> None:
        """Sends a message that ends something, again while that is still in use; fine when it is gone already.

        Raises Failed when it stays in use for so long, or the io process has gone.
        """
        limit = time.monotonic() + seconds
        while True:
            began = time.monotonic()
            try:
                self.call(message)
                return
            except IoRefused as error:
                if error.errno == errno.ENOENT:
                    return
                if error.errno not in (errno.EBUSY, errno.ETIMEDOUT) or time.monotonic() > limit:
                    raise Failed(error.strerror or str(error), errno=errno_symbol(error.errno)) from None
            # Writers may have waited for as long as the attempt took: they get their turn.
            time.sleep(max(0.05, time.monotonic() - began))

    def inventory(self) -> messages.Inventory:
        """What the io process holds now. Raises IoRefused, Failed."""
        inventory = self.call(messages.Status()).inventory
        if inventory is None:
            raise Failed("the io process gave a wrong answer")
        return inventory

    def lost(self, seconds: float = 0.0) -> bool:
        """Whether the process at the other end has gone; waits for that at most `seconds`."""
        with self._lock:
            client = self._client
        if client is None or not client.connected:
            return True
        poll = select.poll()
        poll.register(client.fileno(), select.POLLRDHUP)
        return bool(poll.poll(seconds * 1000))

    def bell(self, seconds: float) -> bool:
        """Waits until the io process has something to look at, at most `seconds`. For one thread."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        return True

    def close(self) -> None:
        """Ends the connection; the io process goes on."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


def _gone(error: OSError | None) -> Failed:
    symbol = errno_symbol(error.errno) if error is not None else None
    return Failed("the io process has died or does not answer", errno=symbol, advice="try again; the log says more")
