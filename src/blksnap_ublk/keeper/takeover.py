# SPDX-License-Identifier: MIT
"""One keeper replaces another that lives, and its children those of the other: a new version under load.

1. The new keeper gets the lock and the listening sockets, and its spares get ready. Whatever fails so far, the former
   daemon goes on.
2. The former keeper leaves; its children are the new one's.
3. The former control process ends, and with it the former io process, in good order (LEAVE); the spares take over as
   after a death. Requests wait in the kernel meanwhile.
"""

import errno
import logging
import signal
import socket
import time
from contextlib import suppress
from types import TracebackType

from blksnap_ublk.keeper.adoption import close_all
from blksnap_ublk.keeper.child import LEAVE
from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.layout import check_layout
from blksnap_ublk.keeper.role import Role
from blksnap_ublk.keeper.runtime import RuntimePaths
from blksnap_ublk.rpc.loop import Loop

log = logging.getLogger(__name__)

IO_END = 5.0
"""Seconds for the former io process to end after control has; then it is killed, which recovery withstands as well."""

STILL_WAITING = 30.0


class NothingToReplace(Exception):
    """No daemon runs, or none that can be replaced; the text says why."""


class Takeover:
    """The replacement of the keeper that is reached at `paths.keeper_socket`."""

    def __init__(self, loop: Loop, paths: RuntimePaths, managed: bool) -> None:
        """Nothing changes yet. `managed`: by the service manager. Raises NothingToReplace, OtherLayout, OSError."""
        self._loop = loop
        self._paths = paths
        self._served_until: float | None = None
        try:
            self._client = KeeperClient(paths.keeper_socket, patience=0)
        except (FileNotFoundError, ConnectionRefusedError):
            raise NothingToReplace("the daemon does not run; `serve` starts it") from None
        try:
            self.check()
            self._descriptors = self._client.hand_over(managed=managed)
        except OSError as error:
            self._client.close()
            text = error.strerror or str(error)
            if error.errno == errno.EBADMSG:
                text = "the daemon that runs is too old to be replaced while it runs; end it by `serve --stop` first"
            raise NothingToReplace(text) from None
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> "Takeover":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_all(self._descriptors)
        self._client.close()

    def check(self) -> None:
        """Whether this version can read the state. Raises OtherLayout."""
        check_layout(self._paths.layout)

    def lock(self) -> int:
        """The lock of the runtime directory; the descriptor is the caller's."""
        return self._descriptors.pop("lock")

    def listener(self, role: str) -> socket.socket:
        """The listening socket of a role; it is the caller's."""
        return socket.socket(fileno=self._descriptors.pop(role))

    def leave(self) -> dict[str, int]:
        """From here on the former keeper does nothing any more. Returns what it held by name; the caller's.

        Raises OSError; it goes on, then, unless it is the connection that broke.
        """
        self._client.leave()
        held: dict[str, int] = {}
        for name in self._client.names():
            held[name] = self._client.get(name)
        return held

    def end_former(self) -> None:
        """Let the former keeper end."""
        with suppress(OSError):
            self._client.stop()

    def switch(self, io: Role, control: Role) -> None:
        """Let both processes that are active end, and then those that stand by take over."""
        ended: set[Role] = set()

        def has_ended(role: Role) -> None:
            ended.add(role)
            if role is io:
                self._served_until = time.monotonic()
                io.start()
            elif io not in ended:
                self._loop.later(IO_END, kill_io)
            # The next control process must not meet the former io process, which may speak another version.
            if ended == {io, control}:
                control.start()

        def kill_io() -> None:
            if io not in ended:
                io.signal(signal.SIGKILL)

        def still_waiting() -> None:
            if control not in ended:
                log.info("the former control process still ends what it has begun")
                self._loop.later(STILL_WAITING, still_waiting)

        self._loop.later(STILL_WAITING, still_waiting)
        io.replace(0, lambda: has_ended(io))
        control.replace(LEAVE, lambda: has_ended(control))

    def pause(self) -> float | None:
        """Seconds from the end of the former io process until now; None when it has not ended."""
        return None if self._served_until is None else time.monotonic() - self._served_until
