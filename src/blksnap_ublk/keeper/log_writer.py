# SPDX-License-Identifier: MIT
"""The process that writes the log: it may wait for the file system of the log for as long as that takes.

It is a process and no thread, because a thread that waits in the kernel for a device of ours would keep its whole
process from ending when it is killed. It is forked by the keeper, never executed anew, and ends with it.
"""

import os
import select
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from blksnap_ublk.keeper.log import PIPE_SIZE, become_stderr_of_all, log_pipe_of
from blksnap_ublk.keeper.process import OWN_SIGNALS, forget_own_signals
from blksnap_ublk.rpc.loop import Loop

LOG_LIMIT = 4 << 20
"""Bytes of a log file; at that size it is renamed to `.1`, so that at most twice as many are ever kept."""

_READ = 1 << 16
_CLOSE_LIMIT = 1.0  # seconds for the last lines to be written
_AGAIN = 1.0  # seconds until it is started again


class LogWriter:
    """The stderr of this process and its children, and the process that writes what comes from there.

    It goes to `path`, or where stderr went before if that is None. It is started again when it dies.
    """

    def __init__(self, loop: Loop, path: Path | None) -> None:
        """Only what is written from now on is logged by it. Raises OSError."""
        self._loop = loop
        self._path = path
        pipe, self._stderr = become_stderr_of_all()
        self._pipes = [pipe]
        self._pid = 0
        self._pidfd = -1

    def adopt(self, pid: int) -> None:
        """Before `start`: log what process `pid`, a child of another keeper, and its own children write."""
        pipe = log_pipe_of(pid)
        if pipe is None:
            return
        if os.path.sameopenfile(pipe, self._stderr):
            os.close(pipe)  # started by that process without a log of its own: it would be written to itself
            return
        self._pipes.append(pipe)

    def start(self) -> None:
        """Begin to write, if it has not begun. For a process of one thread. Raises OSError."""
        if self._pid:
            return
        self._pid = _start(self._pipes, self._stderr, self._path)
        self._pidfd = os.pidfd_open(self._pid)
        self._loop.watch(self._pidfd, self._on_exit)

    def close(self) -> None:
        """Log nothing any more; returns when all is written, or after a second: the log may not answer."""
        nothing = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nothing, 2)
        for number in (nothing, self._stderr, *self._pipes):
            os.close(number)
        if self._pid:
            # It ends when nobody is left who could write to the pipe.
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if poll.poll(_CLOSE_LIMIT * 1000):
                os.waitpid(self._pid, 0)
            self._loop.unwatch(self._pidfd)
            os.close(self._pidfd)

    def _on_exit(self) -> None:
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        os.waitpid(self._pid, 0)
        self._pid = 0
        self._loop.later(_AGAIN, self.start)


def _start(pipes: Sequence[int], stderr: int, path: Path | None) -> int:
    """Fork the process that writes what comes from `pipes` to the file `path`, or to `stderr` if that is None.

    Returns its pid. For a process of one thread. Raises OSError.
    """
    keeper = os.pidfd_open(os.getpid())
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OWN_SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _become_writer(pipes, stderr, path, keeper)
                status = 0
            finally:
                os._exit(status)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(keeper)
    return pid


def _become_writer(pipes: Sequence[int], stderr: int, path: Path | None, keeper: int) -> None:
    forget_own_signals(signal.SIG_IGN)
    with suppress(OSError):
        Path("/proc/self/comm").write_text("blksnap-log")
    _close_all_but({*pipes, stderr, keeper})
    log = _Log(stderr, path)
    sources = {pipe for pipe in pipes if pipe >= 0}
    poll = select.poll()
    poll.register(keeper, select.POLLIN)
    for pipe in sources:
        poll.register(pipe, select.POLLIN)
    over = False
    while not over and sources:
        ready = [number for number, _ in poll.poll()]
        # What the keeper said last was said before it ended.
        over = keeper in ready
        for pipe in sources & set(ready):
            if not _pass_on(pipe, log):
                poll.unregister(pipe)
                sources.remove(pipe)


def _pass_on(pipe: int, log: "_Log") -> bool:
    """Write what there is, or the most that a pipe holds; False when no more can come."""
    for _ in range(PIPE_SIZE // _READ):
        try:
            data = os.read(pipe, _READ)
        except BlockingIOError:
            return True
        if not data:
            return False
        log.write(data)
    return True


class _Log:
    """A log that cannot be written to loses what is written, and nothing else."""

    def __init__(self, stderr: int, path: Path | None) -> None:
        self._descriptor = stderr
        self._path = path
        self._size = 0
        self._open()

    def write(self, data: bytes) -> None:
        if self._path is not None and self._size > LOG_LIMIT:
            with suppress(OSError):
                self._path.rename(self._path.with_name(self._path.name + ".1"))
            self._open()
        with suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]
        if self._path is not None:
            with suppress(OSError):
                self._size = os.fstat(self._descriptor).st_size

    def _open(self) -> None:
        if self._path is None:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(OSError):
            descriptor = os.open(self._path, flags, 0o600)
            os.dup2(descriptor, self._descriptor)
            os.close(descriptor)
            self._size = os.fstat(self._descriptor).st_size


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with suppress(OSError):
                os.close(int(name))
