# SPDX-License-Identifier: MIT
"""A daemon of the test's own, in a runtime directory of its own, and disks; all gone at the end of its `with`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blksnap_ublk.client import Client, connect
from blksnap_ublk.daemon.main import LIFEBOAT_VARIABLE
from blksnap_ublk.keeper.processes import Record, read_processes
from tests.loop_devices import loop_device

PROGRAM = ("-m", "blksnap_ublk.daemon.main")
PATIENCE = 120.0
"""Seconds for what takes a moment on a fast machine."""


@dataclass
class Disks:
    """Loop devices `origin` and `other`, and a directory on a tmpfs."""

    directory: Path
    origin: str
    other: str


@dataclass
class OwnDaemon:
    """How to reach it. `environment` makes the command line use it."""

    runtime: Path
    environment: dict[str, str] = field(default_factory=dict)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line; any exit code."""
        command = [sys.executable, "-m", "blksnap_ublk.cli.main", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=PATIENCE)

    def client(self) -> Client:
        """A client of it; it is started where it does not run."""
        return connect(str(self.runtime / "io.blksnap.Ublk"))

    def pid(self, role: str) -> int:
        """The process that is the keeper, io, control, io-spare or control-spare now; KeyError if there is none."""
        return self.processes().processes[role].pid

    def replaced(self, role: str, former: int) -> bool:
        """Whether a process other than `former` is that now."""
        process = self.processes().processes.get(role)
        return process is not None and process.pid != former

    def processes(self) -> Record:
        """Who they are now, as far as the keeper has written it down."""
        return read_processes(self.runtime / "state" / "processes")

    def start(self, program: Sequence[str] = PROGRAM) -> None:
        """Returns when it serves. `program`: what Python is to run."""
        subprocess.run([sys.executable, *program], env=self.environment, check=True)

    def end(self) -> None:
        """SIGTERM to the keeper, and its end. What is in use is kept for the next start."""
        keeper = self.pid("keeper")
        os.kill(keeper, signal.SIGTERM)
        wait_until("the daemon has ended", lambda: not _is_alive(keeper))

    def log(self) -> str:
        """What it has logged."""
        path = self.runtime / "log"
        return path.read_text() if path.exists() else ""

    def state(self) -> set[str]:
        """The names of its state files, apart from those of the keeper."""
        names = os.listdir(self.runtime / "state")
        common = ("ring-lock.", "map-", "events", "catalogue", "processes", "layout", "buffers-")
        return {name for name in names if not name.startswith(common)}


def state_kinds(daemon: OwnDaemon) -> list[str]:
    """Of state files that belong to devices and snapshots: device, image, records, storage, each as often as it is."""
    return sorted(name.partition("-")[0] for name in daemon.state())


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    """Waits for something that takes a moment; fails after a long time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"still not so after {PATIENCE:.0f} s: {what}"
        time.sleep(0.05)


def ublk_nodes() -> set[str]:
    """The ublk devices that exist."""
    return {path.name for path in Path("/dev").glob("ublk[bc]*")}


@contextmanager
def disks(size: int) -> Iterator[Disks]:
    """Two disks of `size` bytes, in memory where the guest offers that."""
    base = "/tmp/guest" if os.path.ismount("/tmp/guest") else None
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=base)))
        origin, other = (stack.enter_context(loop_device(directory / name, size)) for name in ("origin", "other"))
        yield Disks(directory, origin, other)


@contextmanager
def own_daemon(program: Sequence[str] = PROGRAM, *, lifeboat: bool = False) -> Iterator[OwnDaemon]:
    """A daemon that is running. At the end it removes what is left, and must leave nothing.

    `program`: what Python is to run to start it. Without `lifeboat` its io process may die as often as one likes.
    """
    before = ublk_nodes()
    with tempfile.TemporaryDirectory(prefix="blksnap-test-") as runtime:
        environment = os.environ | _environment(runtime)
        if lifeboat:
            environment.pop(LIFEBOAT_VARIABLE, None)
        else:
            environment[LIFEBOAT_VARIABLE] = "0"
        daemon = OwnDaemon(Path(runtime), environment)
        daemon.start(program)
        try:
            yield daemon
        finally:
            try:
                _empty(daemon)
            finally:
                daemon.end()
    assert ublk_nodes() <= before, daemon.log()


def _environment(runtime: str) -> dict[str, str]:
    """What makes programs use a runtime directory, and keep in it what others keep on a disk."""
    return {"BLKSNAP_UBLK_RUN": runtime, "BLKSNAP_UBLK_STATE": f"{runtime}/saved"}


def _is_alive(pid: int) -> bool:
    """Not for one that has ended and that its parent has not asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _empty(daemon: OwnDaemon) -> None:
    with daemon.client() as client:
        for snapshot in client.list_snapshots():
            client.destroy_snapshots([snapshot.id], force=True)
        for device in client.list_devices():
            client.detach(device.device, force=True)
