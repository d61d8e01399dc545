# SPDX-License-Identifier: MIT
"""One process that the keeper looks after: started by it, or by the keeper before it and adopted."""

import ctypes
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from blksnap_ublk.keeper.child import TURN, TURN_AS_LIFEBOAT
from blksnap_ublk.keeper.identity import Identity
from blksnap_ublk.keeper.processes import Member
from blksnap_ublk.rpc.loop import Loop

OWN_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What ends the keeper. Blocked while it forks: its handlers would take what the other process gets for its own."""

_LINE_LIMIT = 4096
_LOOK = 0.5  # seconds between two looks at a process that may have been killed without ending
_PIDFD_GETFD = 438  # the same on all architectures that have it

_libc = ctypes.CDLL(None, use_errno=True)


def forget_own_signals(action: signal.Handlers) -> None:
    """In a forked process: what ends the keeper is not for it to hear; `action` instead. A mask of them stays."""
    signal.set_wakeup_fd(-1)
    for number in OWN_SIGNALS:
        signal.signal(number, action)


def exit_text(status: int | None) -> str:
    """The status of a process that has ended, in words."""
    if status is None:
        return "exit status unknown"
    if status >= 0:
        return f"exit status {status}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"


@dataclass(frozen=True)
class Start:
    """What a child is started with: its command, and the descriptors that it inherits, by argument.

    `ring_lock` makes the file of each process that gets one; see RingLocks.create.
    """

    command: Sequence[str]
    descriptors: dict[str, int]
    ring_lock: Callable[[], int] | None = None


class Process:
    """A child. `said(line)` is called for each line that it says at its start, `exited(status)` once when it has ended.

    The status is its exit code, negative for a signal; None for one that another keeper started, and for one that was
    killed but cannot end, because a thread of it waits in the kernel.
    """

    def __init__(self, loop: Loop, member: Member, *, own: bool, pipe: int = -1) -> None:
        """`own`: a child of this process. Takes over `pipe`. Raises OSError; the pipe is still the caller's then."""
        self._loop = loop
        self.member = member
        self._own = own
        self._pidfd = os.pidfd_open(member.pid)
        self._pipe = pipe
        self._text = b""
        self.said: Callable[[str], None] = lambda line: None
        self.exited: Callable[[int | None], None] = lambda status: None
        self._exited = False
        loop.watch(self._pidfd, self._on_exit)
        self._look_timer = loop.later(_LOOK, self._look)
        if pipe >= 0:
            loop.watch(pipe, self._on_pipe)

    @classmethod
    def spawn(cls, loop: Loop, start: Start) -> "Process":
        """Start one. What it is to run is not waited for: that may lie on a device of ours. A command that cannot be
        run is said as a failure of the start. For a process of one thread. Raises OSError.
        """
        ring_lock = -1 if start.ring_lock is None else start.ring_lock()
        pipe, said = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        inherited = start.descriptors | {"--ready": said}
        if ring_lock >= 0:
            inherited["--ring-lock"] = ring_lock
        arguments = [text for name, number in inherited.items() for text in (name, str(number))]
        try:
            # Blocked from its first moment: its turn, and its end, may be told at once.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (TURN, TURN_AS_LIFEBOAT, *OWN_SIGNALS))
            try:
                pid = os.fork()
                if pid == 0:
                    forget_own_signals(signal.SIG_DFL)
                    _become([*start.command, *arguments], list(inherited.values()), said)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            identity = Identity.of(pid)
            member = Member(identity.pid, identity.started, start.descriptors["--listener"])
            return cls(loop, member, own=True, pipe=pipe)
        except BaseException:
            os.close(pipe)
            raise
        finally:
            os.close(said)
            if ring_lock >= 0:
                os.close(ring_lock)

    @classmethod
    def adopt(cls, loop: Loop, member: Member) -> "Process":
        """Look after one that a keeper before us started. Raises OSError, ESRCH when it has ended meanwhile."""
        process = cls(loop, member, own=False)
        if not member.alive:
            process.forget()
            raise ProcessLookupError(f"process {member.pid} has ended")
        return process

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens when it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def listener(self) -> socket.socket:
        """A duplicate of its listening socket. Raises OSError."""
        number = int(_libc.syscall(_PIDFD_GETFD, self._pidfd, self.member.listener, 0))
        if number < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), f"descriptor {self.member.listener} of process {self.member.pid}")
        return socket.socket(fileno=number)

    def forget(self) -> None:
        """Look after it no longer; it goes on. May be called again."""
        self._close_pipe()
        self._look_timer.cancel()
        if self._pidfd >= 0:
            self._loop.unwatch(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_pipe(self) -> None:
        while self._pipe >= 0:
            try:
                data = os.read(self._pipe, _LINE_LIMIT)
            except BlockingIOError:
                return
            self._text += data
            *lines, self._text = self._text.split(b"\n")
            if not data or len(self._text) > _LINE_LIMIT:
                lines.append(self._text)
                self._close_pipe()
            for line in filter(None, lines):
                self.said(line.decode("utf-8", "replace"))

    def _on_exit(self) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(self.member.pid, 0)[1]) if self._own else None
        self._on_pipe()
        self.forget()
        self._tell_exit(status)

    def _look(self) -> None:
        self._look_timer = self._loop.later(_LOOK, self._look)
        if not self.member.alive:
            self._look_timer.cancel()
            self._tell_exit(None)

    def _tell_exit(self, status: int | None) -> None:
        if not self._exited:
            self._exited = True
            self.exited(status)

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            self._loop.unwatch(self._pipe)
            os.close(self._pipe)
            self._pipe = -1


def _become(command: list[str], inherited: list[int], said: int) -> NoReturn:
    """In the forked process: run the command, in a session of its own."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        for number in inherited:
            os.set_inheritable(number, True)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execvp(command[0], command)
    except BaseException as error:
        with suppress(OSError):
            os.write(said, f"1 the program cannot be run: {error}\n".encode())
    finally:
        os._exit(127)
