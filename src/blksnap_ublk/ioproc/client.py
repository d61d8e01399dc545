# SPDX-License-Identifier: MIT
"""How the control process asks the io process."""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import cast

from blksnap_ublk.ioproc.messages import VERSION, Answer, Done, Hello, Inventory, Message, Refused, Status
from blksnap_ublk.rpc.client import Client


class IoRefused(OSError):
    """The io process refused a message and has changed nothing. `member`: the device of a Take that was late."""

    def __init__(self, number: int, text: str, member: str | None = None) -> None:
        super().__init__(number, text)
        self.member = member


class IoClient:
    """A connection to the io process. Any thread may call; calls go one after another.

    After an OSError that is not IoRefused (a time-out, an io process that died) the connection is closed and
    `connected` is False: connect anew, and learn from the inventory what was done.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float | None = 30.0) -> None:
        """Connect to `io.sock`. `timeout`: seconds that a call may take unless it says otherwise. Raises OSError."""
        self._timeout = timeout
        self._client: Client[Answer] = Client(path, cast("type[Answer]", Answer))

    @property
    def connected(self) -> bool:
        """False once the connection is closed."""
        return self._client.connected

    def fileno(self) -> int:
        """Readable when the io process has gone away (or an answer is on its way); -1 when closed."""
        return self._client.fileno()

    def call(self, message: Message, descriptors: Sequence[int] = (), *, timeout: float | None = None) -> Done:
        """Send a message with its descriptors, which stay the caller's, and wait for the answer.

        Raises IoRefused, or another OSError (see the class). `timeout` in seconds, in place of that of the connection.
        """
        answer, received = self._client.call(message, descriptors, self._timeout if timeout is None else timeout)
        received.close()
        if isinstance(answer, Refused):
            raise IoRefused(answer.errno, answer.text, answer.member)
        return answer

    def hello(self) -> Inventory:
        """Agree on the version; what the io process holds. Raises IoRefused(EPROTO) for another version."""
        return self._inventory(Hello(VERSION))

    def status(self) -> Inventory:
        """What the io process holds."""
        return self._inventory(Status())

    def close(self) -> None:
        """Close the connection; the io process goes on as it is."""
        self._client.close()

    def __enter__(self) -> "IoClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _inventory(self, message: Message) -> Inventory:
        inventory = self.call(message).inventory
        assert inventory is not None
        return inventory
