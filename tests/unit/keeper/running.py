# SPDX-License-Identifier: MIT
"""A keeper process of the test's own, with harmless children."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from blksnap_ublk.keeper.processes import read_processes
from blksnap_ublk.keeper.runtime import RuntimePaths

RUN_KEEPER = Path(__file__).with_name("run_keeper.py")
PATIENCE = 30


class Running:
    """A keeper process; `told` is its first line: exit code and text. `options`: those of run_keeper.py."""

    def __init__(self, paths: RuntimePaths, io_mode: str = "serve", control_mode: str = "serve", *options: str) -> None:
        self.paths = paths
        self.process = subprocess.Popen(
            [sys.executable, str(RUN_KEEPER), str(paths.root), io_mode, control_mode, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.told = self.process.stdout.readline().rstrip("\n")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The keeper's exit status and log after signal `number`."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, log

    def kill(self) -> None:
        """SIGKILL for the keeper alone."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def answer_of(self, path: Path) -> str:
        """What the process that serves a child's socket answers: its pid, and "!" if it is a lifeboat."""
        kind = socket.SOCK_SEQPACKET if path == self.paths.io_socket else socket.SOCK_STREAM
        answer = b""
        while not answer:  # a process that is about to die may still accept
            with socket.socket(socket.AF_UNIX, kind) as connection:
                connection.settimeout(PATIENCE)
                connection.connect(str(path))
                with contextlib.suppress(ConnectionResetError):
                    answer = connection.recv(32)
        return answer.decode()

    def pid_of(self, path: Path) -> int:
        """The process that serves a child's socket; waits for it over a restart."""
        return int(self.answer_of(path).rstrip("!"))

    def recorded(self, role: str) -> int:
        """The process that is recorded in a role, waited for until there is one that lives."""
        end = time.monotonic() + PATIENCE
        while True:
            member = read_processes(self.paths.processes).living(role)
            if member is not None:
                return member.pid
            assert time.monotonic() < end, f"no {role} process"
            time.sleep(0.02)

    def spare(self, role: str) -> int:
        """The spare of a role, waited for until it stands by."""
        end = time.monotonic() + PATIENCE
        while True:
            pid = self.recorded(f"{role}-spare")
            if waits_for_signal(pid):
                return pid
            assert time.monotonic() < end, f"the {role} process {pid} does not stand by"
            time.sleep(0.02)


def waits_for_signal(pid: int) -> bool:
    """Whether a thread of the process is in sigwait."""
    with contextlib.suppress(OSError):
        return "sigtimedwait" in Path(f"/proc/{pid}/wchan").read_text()
    return False


def alive(pid: int) -> bool:
    """Not for one that has ended and that its parent has not asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pid: int) -> None:
    """Waits for the end of a process."""
    end = time.monotonic() + PATIENCE
    while alive(pid):
        assert time.monotonic() < end, f"process {pid} lives on"
        time.sleep(0.02)


@contextlib.contextmanager
def run(paths: RuntimePaths, *modes: str) -> Iterator[Running]:
    """A keeper that has started; at the end all that it or those after it have left is killed."""
    running = Running(paths, *modes)
    try:
        assert running.told == "0 ready", running.process.communicate()[1] if running.process.poll() else running.told
        yield running
    finally:
        end_all(paths)
        running.process.communicate(timeout=PATIENCE)


def end_all(paths: RuntimePaths) -> None:
    """SIGKILL for all of a daemon, with nobody there meanwhile to start one again."""
    while True:
        record = read_processes(paths.processes)
        living = {role: member.pid for role in record.processes if (member := record.living(role))}
        if not living:
            return
        if "keeper" in living:
            os.kill(living["keeper"], signal.SIGSTOP)
        for pid in sorted(living.values(), key=lambda pid: pid == living.get("keeper")):
            os.kill(pid, signal.SIGKILL)
        for pid in living.values():
            wait_until_gone(pid)


def children(paths: RuntimePaths) -> set[int]:
    """All processes that any keeper has started as io or control."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if bytes(paths.root) in arguments and any(each.endswith(b"fake_child.py") for each in arguments):
                found.add(int(folder.name))
    return found
