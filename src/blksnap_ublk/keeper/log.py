# SPDX-License-Identifier: MIT
"""Logging of the three processes: to stderr, which is a terminal, the journal or the runtime directory's log file.

A daemon in the background has its stderr in `log` there. All processes append to it; the keeper bounds it: at 4 MiB its
contents move to `log.1`, so that at most 8 MiB are ever kept.
"""

import logging
import os
import sys
from pathlib import Path

LOG_LIMIT = 4 << 20

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class _JournalFormatter(logging.Formatter):
    """Lines with the priority that the journal reads at their beginning (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def start_log(role: str, level: int = logging.INFO) -> None:
    """Send this process' log to stderr; `role` is keeper, io or control."""
    handler = logging.StreamHandler(sys.stderr)
    if _stderr_is_journal():
        handler.setFormatter(_JournalFormatter(f"{role}: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {role}[%(process)d] %(levelname)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def stderr_to_file(path: Path) -> None:
    """Make `path` (appended to, mode 0600) the stderr of this process and of those that it starts. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def bound_log(path: Path) -> None:
    """Move the contents of a log past its limit to `path` + `.1`. May lose a line written meanwhile. Raises OSError."""
    if path.stat().st_size > LOG_LIMIT:
        # The writers have the file open: it must stay the same one.
        path.with_name(path.name + ".1").write_bytes(path.read_bytes())
        os.truncate(path, 0)


def _stderr_is_journal() -> bool:
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))
