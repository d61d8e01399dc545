# SPDX-License-Identifier: MIT
"""How the io and control processes reach the keeper."""

import os
from types import TracebackType
from typing import cast

from blksnap_ublk.keeper.messages import MESSAGE_LIMIT, Answer, Done, Drop, Get, List, Message, Put, Refused, Stop
from blksnap_ublk.rpc.client import Client
from blksnap_ublk.rpc.descriptors import Descriptors

TIMEOUT = 10.0


class KeeperClient:
    """A connection to the keeper. Any thread may call. A call raises OSError: what the keeper refused, or a keeper
    that is gone or has not answered for 10 s (the connection is closed then; make another)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Connect to `keeper.sock`. Raises OSError."""
        self._client: Client[Answer] = Client(path, cast("type[Answer]", Answer), MESSAGE_LIMIT)

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

    def stop(self) -> None:
        """End the daemon as SIGTERM to the keeper does; returns at once."""
        self._done(Stop())[1].close()

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
        answer, received = self._client.call(message, descriptors, TIMEOUT)
        if isinstance(answer, Refused):
            received.close()
            raise OSError(answer.errno, answer.text)
        return answer, received
