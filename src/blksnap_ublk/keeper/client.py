# SPDX-License-Identifier: MIT
"""How the io and control processes reach the keeper."""

import errno
import os
import select
import threading
import time
from types import TracebackType
from typing import cast

from blksnap_ublk.keeper.messages import (
    MESSAGE_LIMIT,
    Answer,
    Done,
    Drop,
    Ending,
    Get,
    HandOver,
    Leave,
    List,
    Message,
    Put,
    Refused,
    Stop,
)
from blksnap_ublk.rpc.client import Client
from blksnap_ublk.rpc.descriptors import Descriptors

TIMEOUT = 30.0
PATIENCE = 60.0
"""Seconds for another keeper to come, from when one was missed first; on a busy machine it takes many."""

_ROOM_LIMIT = 10.0  # seconds for a keeper to make room for another connection
_AGAIN = 0.05


class KeeperClient:
    """A connection to the keeper, whichever it is: when one has died, the next one is waited for.

    That is not done over again by each call: when the time is up they fail at once, until there is a keeper.
    Any thread may call. A call raises OSError: what the keeper refused, or that there is none, or that it does not
    answer. What was put with a keeper that has died is not held by the next one: see `lost`.
    """

    def __init__(self, path: str | os.PathLike[str], patience: float = PATIENCE) -> None:
        """Connect to `keeper.sock`. `patience`: seconds for a keeper, now or another one later. Raises OSError."""
        self._path = path
        self._patience = patience
        self._missed: float | None = None
        """When there was first no answer, of the monotonic clock; None while there is a keeper."""
        self._lock = threading.Lock()
        self._client = self._awaited(time.monotonic() + patience)
        self._known = self._client
        """The connection to the keeper that holds what was put."""

    def put(self, name: str, descriptor: int) -> None:
        """Let the keeper hold a duplicate of `descriptor` under `name`, in place of what it held under it."""
        self._done(Put(name), descriptor)[1].close()

    def get(self, name: str) -> int:
        """A descriptor (O_CLOEXEC) of the same open file as the one held under `name`; the caller closes it."""
        with self._done(Get(name))[1] as descriptors:
            return descriptors.take(0)

    def drop(self, name: str) -> None:
        """Let the keeper close what it holds under `name`."""
        self._done(Drop(name))[1].close()

    def names(self) -> list[str]:
        """The names of all that the keeper holds, sorted."""
        done, descriptors = self._done(List())
        descriptors.close()
        return done.names

    def ending(self, status: int) -> None:
        """Control tells the exit status with which it is about to end."""
        self._done(Ending(status))[1].close()

    def stop(self) -> None:
        """End the daemon as SIGTERM to the keeper does; returns at once."""
        self._done(Stop())[1].close()

    def hand_over(self, *, managed: bool) -> dict[str, int]:
        """For a keeper that is about to replace this one: see HandOver. The descriptors are the caller's."""
        done, descriptors = self._done(HandOver(managed))
        with descriptors:
            return {name: descriptors.take(index) for index, name in enumerate(done.names)}

    def leave(self) -> None:
        """For a keeper that replaces this one: see Leave."""
        self._done(Leave(os.getpid()))[1].close()

    def lost(self) -> bool:
        """Whether the keeper that holds what was put has gone, another one may have come; until `reconnect`."""
        client = self._known
        if client is not self._client or not client.connected:
            return True
        poll = select.poll()
        poll.register(client.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def reconnect(self) -> None:
        """Go on with the keeper of now; the caller puts again what is to be held. Raises OSError when there is none."""
        if self.lost():
            self._renew(self._known, 0.0)
        self._known = self._client

    def close(self) -> None:
        """Close the connection; what is held stays held."""
        self._client.close()

    def __enter__(self) -> "KeeperClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _done(self, message: Message, *descriptors: int) -> tuple[Done, Descriptors]:
        end = time.monotonic() + _ROOM_LIMIT
        renewed = False
        while True:
            client = self._client
            try:
                answer, received = client.call(message, descriptors, TIMEOUT)
            except OSError as error:
                # All messages may be repeated. One that came too late for an answer is no reason to wait again.
                if isinstance(error, TimeoutError) or error.errno == errno.EMSGSIZE:
                    raise
                missed = self._missed
                if missed is None:
                    missed = self._missed = time.monotonic()
                if renewed and time.monotonic() > missed + self._patience:
                    raise
                self._renew(client, missed + self._patience)
                renewed = True
                continue
            self._missed = None
            if not isinstance(answer, Refused):
                return answer, received
            received.close()
            if answer.errno != errno.EAGAIN or time.monotonic() > end:
                raise OSError(answer.errno, answer.text)
            time.sleep(_AGAIN)  # it makes room for another one

    def _renew(self, former: Client[Answer], until: float) -> None:
        """Connect again, unless another thread has done so since `former` was in use; tried at least once.

        `until`: of the monotonic clock.
        """
        if not self._lock.acquire(timeout=max(until - time.monotonic(), 0)):
            raise self._gone()
        try:
            if self._client is not former and self._client.connected:
                return
            try:
                client = self._awaited(until)
            except OSError:
                raise self._gone() from None
            former.close()
            self._client = client
        finally:
            self._lock.release()

    def _gone(self) -> ConnectionResetError:
        return ConnectionResetError(errno.ECONNRESET, "the keeper process has gone", os.fspath(self._path))

    def _awaited(self, until: float) -> Client[Answer]:
        while True:
            try:
                return self._connected()
            except OSError:
                if time.monotonic() > until:
                    raise
            time.sleep(_AGAIN)

    def _connected(self) -> Client[Answer]:
        return Client(self._path, cast("type[Answer]", Answer), MESSAGE_LIMIT)
