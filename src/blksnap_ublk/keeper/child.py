# SPDX-License-Identifier: MIT
"""What a child of the keeper (the io process, the control process) is started with, and what it tells at its start.

The keeper adds these arguments to a child's command; all descriptors are inherited:

    --runtime DIR       the runtime directory
    --listener FD       the child's listening socket; it stays open in the keeper over restarts of the child
    --ready FD          a pipe: the child says once that it serves, or why it cannot
    --lock FD           kept open as long as the child lives: a second daemon cannot start meanwhile
    --ring-lock FD      io only: the flocked file for the storage rings (see ring_locks)
"""

import argparse
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk.keeper.runtime import RuntimePaths

EXIT_NOTHING_LEFT = 0
"""Exit status of control after SIGTERM when no ublk device of ours is left: the state files may go."""

EXIT_DEVICES_LEFT = 10
"""Exit status of control after SIGTERM when devices are kept for recovery: the state files must stay."""

READY = "ready"


@dataclass
class ChildStart:
    """The start of a child. Its descriptors are not inherited by what the child starts in its turn."""

    paths: RuntimePaths
    listener: socket.socket
    ring_lock: int | None
    _ready: int

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> "ChildStart":
        """Read the arguments that the keeper adds. Ends the process with status 2 when they are wrong."""
        parser = argparse.ArgumentParser(description="A child of the keeper process; not started by hand.")
        parser.add_argument("--runtime", type=Path, required=True)
        parser.add_argument("--listener", type=int, required=True)
        parser.add_argument("--ready", type=int, required=True)
        parser.add_argument("--lock", type=int)
        parser.add_argument("--ring-lock", type=int)
        read = parser.parse_args(arguments)
        for descriptor in (read.listener, read.ready, read.lock, read.ring_lock):
            if descriptor is not None:
                os.set_inheritable(descriptor, False)
        return cls(RuntimePaths(read.runtime), socket.socket(fileno=read.listener), read.ring_lock, read.ready)

    def ready(self) -> None:
        """Tell the keeper that this process serves. Called once, `failed` not after it."""
        self._tell(READY)

    def failed(self, text: str, exit_code: int = 1) -> None:
        """Tell the keeper why this process cannot serve, in one line; `exit_code` as in the table of the command line.

        At the daemon's start this ends the start and reaches whoever asked for it; the process should exit now.
        """
        self._tell(f"{exit_code} {' '.join(text.split())}")

    def _tell(self, line: str) -> None:
        if self._ready >= 0:
            descriptor, self._ready = self._ready, -1
            try:
                os.write(descriptor, line.encode() + b"\n")
            except BrokenPipeError:
                pass  # the keeper is gone; this process goes on without it
            finally:
                os.close(descriptor)
