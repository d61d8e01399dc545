# SPDX-License-Identifier: MIT
"""Control looks after the keeper: when that has died, another one is started, which adopts what lives.

Where a service manager does that, nobody else does. The active control process starts it at once; a spare a moment
later, for the case that the active one has died as well.
"""

import logging
import os
import select
import subprocess
import threading
import time

from blksnap_ublk.keeper.child import ChildStart
from blksnap_ublk.keeper.processes import Member, read_processes

log = logging.getLogger(__name__)

SPARE_PATIENCE = 2.0
"""Seconds after which a spare acts, when nobody else has."""

_START_LIMIT = 120.0
_AGAIN = 1.0
_LOOK = 0.05


class KeeperWatch:
    """A thread of the control process, from `start` to `stop`."""

    def __init__(self, start: ChildStart) -> None:
        self._start = start
        self._ending = threading.Event()
        self.patience = SPARE_PATIENCE
        """Seconds for somebody else to start another keeper."""

    def start(self) -> None:
        """Begin to watch, where there is something to do when the keeper dies."""
        if self._start.successor:
            threading.Thread(target=self._run, name="keeper watch", daemon=True).start()

    def stop(self) -> None:
        """Start no keeper from now on."""
        self._ending.set()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._watch()
            except OSError as error:
                log.error("looking for the keeper: %s", error)
                self._ending.wait(_AGAIN)

    def _watch(self) -> None:
        keeper = self._keeper()
        if keeper is not None:
            _wait_for_end(keeper)
            return
        # Another keeper becomes known as soon as it has adopted this process.
        end = time.monotonic() + self.patience
        while self._keeper() is None and time.monotonic() < end and not self._ending.wait(_LOOK):
            pass
        if self._keeper() is None and not self._ending.is_set():
            self._start_another()

    def outlast(self) -> None:
        """For one that cannot serve: returns when a keeper lives, which will start another one in its place."""
        while self._start.successor and self._keeper() is None:
            time.sleep(_LOOK)

    def _keeper(self) -> Member | None:
        return read_processes(self._start.paths.processes).living("keeper")

    def _start_another(self) -> None:
        log.error("the keeper has died; starting another one")
        command = list(self._start.successor)
        inherited = []
        if self._start.host is not None:
            command += ["--host-namespace", str(self._start.host)]
            inherited = [self._start.host]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=inherited,
                cwd="/",
                start_new_session=True,
                timeout=_START_LIMIT,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            log.error("no keeper can be started: %s", error)
            self._ending.wait(_AGAIN)
            return
        # Somebody else may have been faster.
        if done.returncode and self._keeper() is None:
            log.error("no keeper could be started (exit status %d)", done.returncode)
            self._ending.wait(_AGAIN)


def _wait_for_end(member: Member) -> None:
    try:
        descriptor = os.pidfd_open(member.pid)
    except OSError:
        return
    try:
        if member.alive:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
    finally:
        os.close(descriptor)
