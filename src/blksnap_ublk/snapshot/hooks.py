# SPDX-License-Identifier: MIT
"""Programs of the administrator that run before and after a snapshot is taken, to bring applications to rest.

DIRECTORY/before.d and DIRECTORY/after.d hold executables. They run one after the other in the order of their names,
each with the snapshot's JSON on its standard input, and in its environment BLKSNAP_SNAPSHOT (the id), BLKSNAP_PHASE
(`before` or `after`) and BLKSNAP_TAKEN (`1` once the snapshot has been taken, otherwise `0`). One that does not end
with status 0 within LIMIT has failed; its last line of output is its message.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import stat
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from blksnap_ublk.errors import BlksnapError, Failed, errno_symbol, from_os_error, one_line

LIMIT = 60.0
"""Seconds for each hook."""
_OUTPUT = 4096  # bytes of output that are kept, from its end
_MESSAGE = 500  # characters of a message
_REAP = 2.0  # seconds in which a hook that was killed is gone, unless the kernel holds it
_DRAIN = 1.0  # seconds for reading what a hook has written when it has ended; what it left running may go on writing

log = logging.getLogger(__name__)


def run_before(directory: Path | None, snapshot_json: bytes) -> None:
    """Runs the hooks of before.d until one fails; raises Failed with its message then.

    `run_after` is to be called afterwards in any case, also if this has raised: some may have run by then.
    """
    for path in _hooks(directory, "before.d"):
        _run(path, snapshot_json, phase="before", taken=False)


def run_after(directory: Path | None, snapshot_json: bytes, *, taken: bool) -> list[str]:
    """Runs all hooks of after.d, whichever fail; a warning for each that did."""
    warnings: list[str] = []
    try:
        paths = _hooks(directory, "after.d")
    except BlksnapError as error:
        return [error.message]
    for path in paths:
        try:
            _run(path, snapshot_json, phase="after", taken=taken)
        except BlksnapError as error:
            warnings.append(error.message)
    return warnings


def _hooks(directory: Path | None, folder: str) -> list[Path]:
    """The executables of a folder by name; none where there is no folder. Raises BlksnapError if it cannot be read."""
    if directory is None:
        return []
    where = directory / folder
    try:
        names = sorted(os.listdir(where))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, subject=str(where)) from None
    return [where / name for name in names if not name.startswith(".") and _is_hook(where / name)]


def _is_hook(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return True  # running it says what is wrong
    if stat.S_ISREG(mode) and not mode & 0o111:
        log.warning("%s: not executable, so it is not run as a hook", path)
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def _run(path: Path, snapshot_json: bytes, *, phase: str, taken: bool) -> None:
    environment = os.environ | {
        "BLKSNAP_SNAPSHOT": str(json.loads(snapshot_json)["id"]),
        "BLKSNAP_PHASE": phase,
        "BLKSNAP_TAKEN": str(int(taken)),
    }
    text = os.memfd_create("snapshot", os.MFD_CLOEXEC)  # not a pipe: a hook may read none of it
    try:
        with open(text, "wb", closefd=False) as file:
            file.write(snapshot_json)
        os.lseek(text, 0, os.SEEK_SET)
        hook = subprocess.Popen(
            [path],
            stdin=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise Failed("cannot be run", subject=str(path), errno=errno_symbol(error.errno)) from None
    finally:
        os.close(text)
    with suppress(OSError):  # it is not to be spared when memory is short, as the daemon is
        Path(f"/proc/{hook.pid}/oom_score_adj").write_text("0")
    try:
        output = _follow(hook, time.monotonic() + LIMIT)
    finally:
        assert hook.stdout is not None
        hook.stdout.close()
        if hook.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(hook.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                hook.wait(_REAP)
    if output is None:
        raise Failed(f"did not end within {LIMIT:g} s and was killed", subject=str(path))
    if hook.returncode != 0:
        raise Failed(f"{_ending(hook.returncode)}{_message(output)}", subject=str(path))


def _follow(hook: subprocess.Popen[bytes], end: float) -> bytes | None:
    """The end of what a hook writes until it ends; None when it has not ended in time.

    What it leaves running may keep the pipe open: its own end counts, not that of the pipe.
    """
    assert hook.stdout is not None
    stdout = hook.stdout.fileno()
    handle = os.pidfd_open(hook.pid)
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    poller.register(stdout, select.POLLIN)
    output, ended = b"", False
    try:
        while True:
            left = end - time.monotonic()
            ready = [descriptor for descriptor, _ in poller.poll(max(left, 0) * 1000)]
            if handle in ready and not ended:
                ended = True
                end = min(end, time.monotonic() + _DRAIN)
            if stdout in ready:
                piece = os.read(stdout, 1 << 16)
                output = (output + piece)[-_OUTPUT:]
                if not piece:
                    poller.unregister(stdout)
            if ended and (stdout not in ready or left <= 0):
                hook.wait()
                return output
            if left <= 0:
                return None
    finally:
        os.close(handle)


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _message(output: bytes) -> str:
    lines = [line for line in output.decode("utf-8", "backslashreplace").splitlines() if line.strip()]
    if not lines:
        return ", without a message"
    return ": " + one_line("".join(c if c.isprintable() else " " for c in lines[-1]))[-_MESSAGE:]
