# SPDX-License-Identifier: MIT
"""Looking at file systems that are frozen, and at the helper processes that freeze them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

FREEZER, WATCHDOG = "bsu-freezer", "bsu-watchdog"
PATIENCE = 60.0
"""Seconds for what takes a moment."""
SHORT = 1.0
"""Seconds after which what has not happened waits."""


def helpers(directory: Path, *names: str) -> list[int]:
    """The processes of these names that have the file system mounted at `directory` open."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if path.read_text().strip() in names and any(
                os.readlink(link) == str(directory) for link in (path.parent / "fd").iterdir()
            ):
                found.append(int(path.parent.name))
    return found


def wait_until_gone(directory: Path) -> None:
    """Until no helper has the file system open."""
    end = time.monotonic() + PATIENCE
    while helpers(directory, FREEZER, WATCHDOG):
        assert time.monotonic() < end, "helpers do not end"
        time.sleep(0.05)


def kill(*pids: int) -> None:
    """With -9, those that still live."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def written(directory: Path) -> subprocess.Popen[bytes]:
    """A process that writes a file down to the device: it waits while the file system is frozen."""
    command = ["dd", "if=/dev/zero", f"of={directory}/written", "bs=4k", "count=1", "conv=fsync", "status=none"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def assert_thawed(directory: Path) -> None:
    """A write ends. Where it does not, the file system is thawed, so that the machine survives, and the test fails."""
    assert_ends(written(directory), directory)


def assert_ends(writer: subprocess.Popen[bytes], directory: Path) -> None:
    """The same with a write that has begun."""
    try:
        assert writer.wait(PATIENCE) == 0
    except subprocess.TimeoutExpired:
        subprocess.run(["fsfreeze", "-u", str(directory)], check=False)
        writer.wait(PATIENCE)
        raise AssertionError(f"{directory} stayed frozen") from None


def assert_frozen(directory: Path) -> subprocess.Popen[bytes]:
    """A write does not end; it goes on waiting."""
    writer = written(directory)
    with suppress(subprocess.TimeoutExpired):
        writer.wait(SHORT)
        raise AssertionError(f"{directory} is not frozen")
    return writer
