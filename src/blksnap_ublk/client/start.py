# SPDX-License-Identifier: MIT
"""Starting the daemon when nobody else is there to do it."""

import fcntl
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from blksnap_ublk.client.runtime import DEFAULT_RUNTIME
from blksnap_ublk.errors import BlksnapError, Busy, Failed, from_os_error, with_exit_code

DAEMON_MODULE = "blksnap_ublk.daemon.main"
READY = b"ready\n"
READY_SECONDS = 60
OTHERS_START_SECONDS = 5.0
LAST_WORDS_BYTES = 4096
UNIT = "blksnap-ublk.service"
UNIT_DIRECTORIES = ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system",
                    "/usr/lib/systemd/system", "/lib/systemd/system")  # fmt: skip

# Children that were started: kept, so that one which ends is reaped and none is taken for forgotten.
_started: list[subprocess.Popen[bytes]] = []


def start_daemon(runtime: str, listens: Callable[[], bool], hooks: str | None = None) -> None:
    """Start a daemon for the runtime directory and return when it listens; `listens` tells whether one does.

    `hooks`: the directory of the programs that it runs before and after a snapshot is taken, None for the usual one.

    Raises Failed where systemd owns the daemon, or what the daemon itself said when it could not start.
    """
    _leave_it_to_systemd(runtime)
    try:
        os.makedirs(runtime, mode=0o700, exist_ok=True)
        with _one_at_a_time(runtime):
            if not listens():
                _start(listens, [] if hooks is None else ["--hooks", hooks])
    except PermissionError as error:
        raise not_root() from error
    except OSError as error:
        raise from_os_error(error, subject=runtime) from error


def not_root() -> BlksnapError:
    """The error for a caller who may not talk to the daemon."""
    return Failed("needs root", errno="EACCES", advice="use sudo")


def _leave_it_to_systemd(runtime: str) -> None:
    if runtime != DEFAULT_RUNTIME or not os.path.isdir("/run/systemd/system"):
        return
    if any(os.path.exists(os.path.join(directory, UNIT)) for directory in UNIT_DIRECTORIES):
        raise Failed("the daemon is not running", advice=f"systemd owns it: systemctl start {UNIT}")


@contextmanager
def _one_at_a_time(runtime: str) -> Iterator[None]:
    directory = os.open(runtime, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _start(listens: Callable[[], bool], options: Sequence[str]) -> None:
    with tempfile.TemporaryFile() as complaints:
        reading, writing = os.pipe()
        try:
            try:
                # -P: the working directory of whoever calls is no place to import from.
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", DAEMON_MODULE, "--ready-fd", str(writing), *options],
                    stdin=subprocess.DEVNULL,
                    stdout=complaints,
                    stderr=complaints,
                    pass_fds=[writing],
                    cwd="/",
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            said = _read_until_ready(reading, process)
        finally:
            os.close(reading)
        if said == READY:
            _let_go(process)
            return
        error = _failure(process, said, complaints)
    # One that was started by hand at the same moment is as good.
    if isinstance(error, Busy) and _comes_up(listens):
        return
    raise error


def _read_until_ready(reading: int, process: "subprocess.Popen[bytes]") -> bytes:
    """What the daemon writes: READY, or its last words up to the end. Raises Failed when it stays silent."""
    deadline = time.monotonic() + READY_SECONDS
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    said = b""
    while said != READY:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            process.terminate()
            raise Failed(f"the daemon was not ready after {READY_SECONDS} seconds")
        data = os.read(reading, LAST_WORDS_BYTES)
        if not data:
            break
        said = (said + data)[-LAST_WORDS_BYTES:]
    return said


def _let_go(process: "subprocess.Popen[bytes]") -> None:
    """Reap the process that started the daemon, or remember it if it is the daemon itself."""
    _started[:] = [started for started in _started if started.poll() is None]
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        _started.append(process)


def _failure(process: "subprocess.Popen[bytes]", said: bytes, complaints: IO[bytes]) -> BlksnapError:
    """The error for a daemon that ended, or is about to, without being ready."""
    try:
        exit_code = process.wait(READY_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        exit_code = process.wait()
    words = said.decode(errors="replace").strip()
    if not words:
        complaints.seek(0)
        lines = complaints.read()[-LAST_WORDS_BYTES:].decode(errors="replace").split("\n")
        words = next((line.strip() for line in reversed(lines) if line.strip()), f"it ended with status {exit_code}")
    words = words.removeprefix("blksnap-ublkd: ")
    return with_exit_code(f"the daemon did not start: {words}", exit_code)


def _comes_up(listens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + OTHERS_START_SECONDS
    while time.monotonic() < deadline:
        if listens():
            return True
        time.sleep(0.05)
    return False
