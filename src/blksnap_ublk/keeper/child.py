# SPDX-License-Identifier: MIT
"""What a child of the keeper (the io process, the control process) is started with, and what it tells at its start.

The keeper adds these arguments to a child's command; all descriptors are inherited:

    --runtime DIR       the runtime directory
    --listener FD       the child's listening socket; it stays open in the keeper over restarts of the child
    --ready FD          a pipe: the child says that it stands by, that it serves or why it cannot, that it is alive
    --ring-lock FD      io only: the flocked file for the storage rings (see ring_locks)
    --host FD           control only, where the daemon has a mount namespace of its own: that of the host
    --successor JSON    control only: the command that starts another keeper when this one dies, absent where a service
                        manager does that

Of each role there are two processes: the active one, and a spare that has done all that can be done ahead and waits for
its turn (SIGUSR1, or SIGUSR2 for an io process that is to be a lifeboat). Both signals are blocked from the child's
beginning, and so are SIGTERM and SIGINT until it unblocks them: none comes too early.
"""

import argparse
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blksnap_ublk.keeper import ring_locks
from blksnap_ublk.keeper.identity import Identity
from blksnap_ublk.keeper.processes import read_processes
from blksnap_ublk.keeper.runtime import RuntimePaths

log = logging.getLogger(__name__)

EXIT_NOTHING_LEFT = 0
"""Exit status of control after SIGTERM when no ublk device of ours is left: the state files may go."""

EXIT_DEVICES_LEFT = 10
"""Exit status of control after SIGTERM when devices are kept for recovery: the state files must stay."""

EXIT_HANDED_OVER = 11
"""Exit status of control after LEAVE: another version takes over what is served."""

TURN = signal.SIGUSR1
TURN_AS_LIFEBOAT = signal.SIGUSR2
LEAVE = signal.SIGUSR2
"""To the active control process: make room for another version (see daemon/leaving.py)."""

STANDS_BY = "stands by"
READY = "ready"
ALIVE = "alive"

ALIVE_INTERVAL = 5.0
"""Seconds between two signs of life of a control process."""

FORGOTTEN_LOOK = 2.0
"""Seconds between two looks of one that waits for its turn at whether anybody knows of it."""


@dataclass
class ChildStart:
    """The start of a child. Its descriptors are not inherited by what the child starts in its turn.

    `host`: the mount namespace of the host, or None; `successor`: the command of another keeper, empty where a service
    manager starts it. `lifeboat`: the forerunners died again and again; known after `wait_for_turn`.
    """

    paths: RuntimePaths
    listener: socket.socket
    ring_lock: int | None
    host: int | None
    successor: list[str]
    _ready: int
    lifeboat: bool = field(default=False, init=False)

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> "ChildStart":
        """Read the arguments that the keeper adds. Ends the process with status 2 when they are wrong."""
        parser = argparse.ArgumentParser(description="A child of the keeper process; not started by hand.")
        parser.add_argument("--runtime", type=Path, required=True)
        parser.add_argument("--listener", type=int, required=True)
        parser.add_argument("--ready", type=int, required=True)
        parser.add_argument("--ring-lock", type=int)
        parser.add_argument("--host", type=int)
        parser.add_argument("--successor", type=json.loads, default=[])
        read = parser.parse_args(arguments)
        for descriptor in (read.listener, read.ready, read.ring_lock, read.host):
            if descriptor is not None:
                os.set_inheritable(descriptor, False)
        paths, listener = RuntimePaths(read.runtime), socket.socket(fileno=read.listener)
        return cls(paths, listener, read.ring_lock, read.host, read.successor, read.ready)

    def wait_for_turn(self) -> None:
        """Return when this process is to serve; nothing may be left to import, to read or to allocate then.

        Both signals of the turn stay blocked: whoever wants them later has to unblock them. Ends the process when
        nobody will ever tell it: its keeper died between its start and the record of it, or nothing is left to serve.
        """
        if self.ring_lock is not None:
            ring_locks.sign(self.ring_lock)
        turns = (TURN, TURN_AS_LIFEBOAT)
        signal.pthread_sigmask(signal.SIG_BLOCK, turns)
        self._tell(STANDS_BY)
        forgotten = 0
        while (told := signal.sigtimedwait(turns, FORGOTTEN_LOOK)) is None:
            # Twice: a look while the record is written may find none.
            forgotten = forgotten + 1 if self._is_forgotten() else 0
            if forgotten == 2:
                log.error("process %d ends: its keeper has died, and no other one knows of it", os.getpid())
                sys.exit(1)
        self.lifeboat = told.si_signo == TURN_AS_LIFEBOAT

    def ready(self) -> None:
        """Tell the keeper that this process serves. Called once, `failed` not after it."""
        self._tell(READY)

    def alive(self) -> None:
        """Tell the keeper that this process, which serves, still does; every ALIVE_INTERVAL from the first time on."""
        self._tell(ALIVE)

    def failed(self, text: str, exit_code: int = 1) -> None:
        """Tell the keeper why this process cannot serve, in one line; `exit_code` as in the table of the command line.

        At the daemon's start this ends the start and reaches whoever asked for it; the process should exit now.
        """
        self._tell(f"{exit_code} {' '.join(text.split())}")
        self._close()

    def _is_forgotten(self) -> bool:
        """Whether the keeper that started it is gone, and another one is there, or nobody, that does not know it."""
        if self._ready >= 0:
            reader = select.poll()
            reader.register(self._ready, 0)
            if not reader.poll(0):
                return False
        this, record = Identity.of(), read_processes(self.paths.processes)
        if any((each.pid, each.started) == (this.pid, this.started) for each in record.processes.values()):
            return False
        # While one is yet to come, this process may be who starts it.
        return not record.processes or record.living("keeper") is not None

    def _tell(self, line: str) -> None:
        if self._ready >= 0:
            try:
                os.write(self._ready, line.encode() + b"\n")
            except BlockingIOError:
                pass  # a keeper that does not read has other troubles
            except BrokenPipeError:
                self._close()  # the keeper is gone; this process goes on without it

    def _close(self) -> None:
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1
