# SPDX-License-Identifier: MIT
"""One child of the keeper: started, told apart as ready or failed, started again when it dies."""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk.keeper.child import READY
from blksnap_ublk.rpc.loop import Loop, Timer

log = logging.getLogger(__name__)

QUICK_DEATH = 5.0
"""A child that lived less than this many seconds died quickly."""

RESTART_DELAYS = (0.0, 0.0, 0.25, 0.5, 1.0)
"""Seconds before the restart after so many quick deaths in a row …"""

LAST_DELAY = 5.0
"""… and after more than these."""


def exit_text(status: int) -> str:
    """A Popen return code in words."""
    if status >= 0:
        return f"exit status {status}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"


@dataclass
class ChildEvents:
    """What a child calls back.

    `started(pid)` after each start; `ready()` once, when it serves for the first time; `failed(code, text)` when its
    first start failed; `ended(status)` once, after `stop`, `kill` or `expect_end`, with a Popen return code, or None
    when it did not run then.
    """

    started: Callable[[int], None]
    ready: Callable[[], None]
    failed: Callable[[int, str], None]
    ended: Callable[[int | None], None]


class Child:
    """A process that runs `command` with the arguments of keeper/child.py added, in a session of its own."""

    def __init__(
        self,
        loop: Loop,
        role: str,
        command: Sequence[str],
        *,
        runtime: Path,
        listener: socket.socket,
        lock: int,
        events: ChildEvents,
        ring_lock: Callable[[], int] | None = None,
    ) -> None:
        """`ring_lock` makes the file of each new process that gets one; see RingLocks.create."""
        self._loop = loop
        self.role = role
        self._command = list(command)
        self._runtime = runtime
        self._listener = listener
        self._lock = lock
        self._ring_lock = ring_lock
        self._events = events
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._pipe = -1
        self._said = b""
        self._began = 0.0
        self._quick_deaths = 0
        self._restart: Timer | None = None
        self._was_ready = False
        self._ending = False
        self._over = False

    @property
    def running(self) -> bool:
        """Whether a process exists."""
        return self._process is not None

    def start(self) -> None:
        """Start it for the first time. A failure is reported by the event `failed`."""
        try:
            self._spawn()
        except OSError as error:
            self._events.failed(1, f"the {self.role} process cannot be started: {error}")

    def expect_end(self) -> None:
        """Do not start it again; it is about to end by itself, or does not run."""
        self._ending = True
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if self._process is None:
            self._end(None)

    def stop(self) -> None:
        """SIGTERM, and no restart."""
        if self._process is not None:
            self._process.terminate()
        self.expect_end()

    def kill(self) -> None:
        """SIGKILL, and no restart."""
        if self._process is not None:
            self._process.kill()
        self.expect_end()

    def _spawn(self) -> None:
        self._restart = None
        ring_lock = -1 if self._ring_lock is None else self._ring_lock()
        pipe, said = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            inherited = {"--listener": self._listener.fileno(), "--ready": said, "--lock": self._lock}
            if ring_lock >= 0:
                inherited["--ring-lock"] = ring_lock
            arguments = [text for name, number in inherited.items() for text in (name, str(number))]
            process = subprocess.Popen(
                [*self._command, "--runtime", str(self._runtime), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=tuple(inherited.values()),
                start_new_session=True,
            )
        except BaseException:
            os.close(pipe)
            raise
        finally:
            os.close(said)
            if ring_lock >= 0:
                os.close(ring_lock)
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except BaseException:
            os.close(pipe)
            process.kill()
            process.wait()
            raise
        self._process, self._pipe, self._said = process, pipe, b""
        self._began = time.monotonic()
        self._loop.watch(self._pipe, self._on_pipe)
        self._loop.watch(self._pidfd, self._on_exit)
        self._events.started(process.pid)

    def _on_pipe(self) -> None:
        try:
            data = os.read(self._pipe, 4096)
        except BlockingIOError:
            return
        self._said += data
        if data and b"\n" not in self._said and len(self._said) < 4096:
            return
        self._close_pipe()
        line = self._said.partition(b"\n")[0].decode("utf-8", "replace")
        if line == READY:
            log.info("%s process %d serves", self.role, self._pid())
            if not self._was_ready:
                self._was_ready = True
                self._events.ready()
        elif line:
            code, _, text = line.partition(" ")
            if self._was_ready or self._ending:
                log.error("%s process: %s", self.role, text)
            else:
                self._ending = True
                self._events.failed(int(code) if code.isdecimal() else 1, text)

    def _on_exit(self) -> None:
        process = self._process
        assert process is not None
        status = process.wait()
        if self._pipe >= 0:
            self._on_pipe()
        self._close_pipe()
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        self._process = None
        if self._ending:
            self._end(status)
        elif not self._was_ready:
            self._ending = True
            self._events.failed(1, f"the {self.role} process ended at its start ({exit_text(status)})")
        else:
            self._restart_later(process.pid, status)

    def _restart_later(self, pid: int, status: int) -> None:
        quick = time.monotonic() - self._began < QUICK_DEATH
        self._quick_deaths = self._quick_deaths + 1 if quick else 0
        settled = self._quick_deaths >= len(RESTART_DELAYS)
        delay = LAST_DELAY if settled else RESTART_DELAYS[self._quick_deaths]
        log.error("%s process %d died (%s); started again in %g s", self.role, pid, exit_text(status), delay)
        self._restart = self._loop.later(delay, self._respawn)

    def _respawn(self) -> None:
        try:
            self._spawn()
        except OSError as error:
            log.error("the %s process cannot be started, next try in %g s: %s", self.role, LAST_DELAY, error)
            self._restart = self._loop.later(LAST_DELAY, self._respawn)

    def _end(self, status: int | None) -> None:
        if not self._over:
            self._over = True
            self._events.ended(status)

    def _pid(self) -> int:
        return -1 if self._process is None else self._process.pid

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            self._loop.unwatch(self._pipe)
            os.close(self._pipe)
            self._pipe = -1
