# SPDX-License-Identifier: MIT
"""Logging of the daemon's processes. What they log must never make one of them wait: the log may lie on a device that
waits for exactly this process.

So the stderr of the keeper, of its children and of what they start is one pipe, which never blocks: what does not fit
is dropped and counted. A process of its own writes what comes out of it (see log_writer). The pipe lives as long as any
of them does; a keeper that replaces another one goes on reading the pipe of the children that it adopts.
"""

import faulthandler
import fcntl
import logging
import os
import sys
from contextlib import suppress

PIPE_SIZE = 1 << 20
RECORD_PIECE = 4096
"""Bytes that a pipe takes whole or not at all."""

VARIABLE = "BLKSNAP_UBLK_LOG"
"""Set to `journal` by the keeper for its children where the log goes to the journal."""

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class _JournalFormatter(logging.Formatter):
    """Lines with the priority that the journal reads at their beginning (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _StderrHandler(logging.Handler):
    """Writes to descriptor 2, line by line. What that does not take at once is dropped; how much is said later."""

    def __init__(self) -> None:
        super().__init__()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        try:
            # In one piece: the short notices would fill what the messages do not fit into.
            _write(self._notice() + text)
            self._dropped = 0
        except OSError:
            self._dropped += 1

    def _notice(self) -> str:
        if not self._dropped:
            return ""
        text = f"{self._dropped} messages are missing here"
        return self.format(logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)) + "\n"


def start_log(role: str, level: int = logging.INFO) -> None:
    """Send this process' log, and what it says when it crashes, to stderr; `role` is keeper, io or control."""
    handler = _StderrHandler()
    if _stderr_is_journal() or os.environ.get(VARIABLE) == "journal":
        handler.setFormatter(_JournalFormatter(f"{role}: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {role}[%(process)d] %(levelname)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    with suppress(OSError, ValueError, RuntimeError):
        faulthandler.enable(file=2)


def become_stderr_of_all() -> tuple[int, int]:
    """Make a pipe that never blocks the stderr of this process and of those that it starts from now on.

    Returns the end to read from and what stderr was before; both are the caller's. Raises OSError.
    """
    if _stderr_is_journal():
        os.environ[VARIABLE] = "journal"
    former = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with suppress(OSError):
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        # To read as well: a pipe without a reader would refuse what is written between two keepers.
        both = os.open(f"/proc/self/fd/{writing}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            sys.stderr.flush()
            os.dup2(both, 2)
        finally:
            os.close(both)
    finally:
        os.close(writing)
    return reading, former


def log_pipe_of(pid: int) -> int | None:
    """The end to read from of the pipe that is the stderr of process `pid`, None where that is no pipe."""
    path = f"/proc/{pid}/fd/2"
    try:
        if not os.readlink(path).startswith("pipe:"):
            return None
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None


def _write(text: str) -> None:
    """Raises OSError when not all was taken."""
    data = text.encode(errors="backslashreplace") + b"\n"
    while data:
        piece = data[:RECORD_PIECE]
        if len(data) > RECORD_PIECE:
            piece = piece[: piece.rfind(b"\n") + 1] or piece
        data = data[os.write(2, piece) :]


def _stderr_is_journal() -> bool:
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))
