# SPDX-License-Identifier: MIT
"""The helper process that freezes file systems: `python freezer.py SECONDS DIRECTORY…`, or `thaw DIRECTORY…`.

It thaws what it froze when it is told to, when its standard input ends because the process that started it has died,
or after SECONDS, whatever comes first. It answers each step with one line of JSON. It is a process of its own because a
process that waits for a file system above its own device cannot be ended (and a frozen one makes everybody wait).
Between freezing and thawing it opens, writes and allocates nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import sys

_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878
_MCL_CURRENT, _MCL_FUTURE = 1, 2


def main() -> int:
    if sys.argv[1] == "thaw":
        return _thaw(sys.argv[2:])
    seconds, directories = float(sys.argv[1]), sys.argv[2:]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlockall(_MCL_CURRENT | _MCL_FUTURE)
    opened: list[int] = []
    for directory in directories:
        try:
            opened.append(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            opened.append(-(error.errno or errno.EIO))
    _answer({"ready": True})
    if not _told():
        return 0
    # What is dirty is written before anything is frozen, so that freezing itself is short.
    for descriptor in opened:
        if descriptor >= 0:
            libc.syncfs(descriptor)
    frozen: list[int] = []
    results: list[int] = []
    for descriptor in opened:
        result = -descriptor if descriptor < 0 else _ioctl(descriptor, _FIFREEZE)
        results.append(result)
        if descriptor >= 0 and result == 0:
            frozen.append(descriptor)
    try:
        _answer({"results": results})
        late = not select.select([0], [], [], seconds)[0]
    except OSError:
        late = True
    thawed = [_ioctl(descriptor, _FITHAW) for descriptor in reversed(frozen)]
    _answer({"late": late, "thawed": list(reversed(thawed))})
    return 0


def _thaw(directories: list[str]) -> int:
    for directory in directories:
        with contextlib.suppress(OSError):
            _ioctl(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), _FITHAW)
    return 0


def _ioctl(descriptor: int, request: int) -> int:
    """0 or a positive errno."""
    try:
        fcntl.ioctl(descriptor, request, 0)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _told() -> bool:
    return bool(os.read(0, 1))


def _answer(value: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(value).encode() + b"\n")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.exit(main())
