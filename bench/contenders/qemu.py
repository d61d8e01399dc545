# SPDX-License-Identifier: MIT
"""qemu-storage-daemon with its copy-before-write filter, whose device the kernel's NBD client shows on this machine.

NBD on a UNIX socket is the one of its exports that is a block device on the same machine, with any kernel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.contenders.contender import Contender, Unavailable
from bench.document import Speed
from bench.measure import Job, measure

DAEMON = "qemu-storage-daemon"
CLIENT = "nbd-client"
PATIENCE = 60.0


def check_qemu() -> None:
    """Raises Unavailable. Loads the kernel's NBD client where that is all that is missing."""
    for program in (DAEMON, CLIENT):
        if shutil.which(program) is None:
            raise Unavailable(f"no {program} here: scripts/setup bench installs it")
    if not list(Path("/sys/block").glob("nbd*")):
        subprocess.run(["modprobe", "-q", "nbd"], capture_output=True, check=False)
    if not list(Path("/sys/block").glob("nbd*")):
        raise Unavailable("this kernel has no NBD client")


def qemu_version() -> str:
    """`none` where there is none."""
    if shutil.which(DAEMON) is None:
        return "none"
    said = subprocess.run([DAEMON, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\S+)", said)
    return found[1] if found else "unknown"


@contextmanager
def copied_before_write(origin: str, target: str) -> Iterator[str]:
    """The path of a device on `origin` whose writes copy what they overwrite to `target`, for the first time each."""
    with tempfile.TemporaryDirectory(prefix="bench-qemu-") as folder:
        socket = Path(folder, "nbd")
        command = [
            DAEMON,
            *("--blockdev", _disk("origin", origin), "--blockdev", _disk("target", target)),
            *("--blockdev", "driver=copy-before-write,node-name=filter,file=origin,target=target"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
            *("--export", "type=nbd,id=export,node-name=filter,name=bench,writable=on"),
        ]
        with tempfile.TemporaryFile("w+") as said:
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            try:
                _wait(lambda: socket.exists() or daemon.poll() is not None)
                if daemon.poll() is not None:
                    said.seek(0)
                    raise Unavailable(f"{DAEMON}: {said.read().strip()}")
                with _nbd(socket) as path:
                    yield path
            finally:
                daemon.terminate()
                try:
                    daemon.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


@dataclass
class FirstQemuOverwrites(Contender):
    """`device` is the origin: what was copied is forgotten before each run."""

    target: str = field(kw_only=True)

    @property
    def steady(self) -> bool:
        """It is not."""
        return False

    def run(self, cell: str, job: Job) -> Speed:
        """A run of a job that writes no block twice."""
        with copied_before_write(self.device, self.target) as top:
            return measure(cell, top, job)


def _disk(name: str, path: str) -> str:
    return f"driver=host_device,node-name={name},filename={path},cache.direct=on,aio=native"


@contextmanager
def _nbd(socket: Path) -> Iterator[str]:
    free = next((disk for disk in sorted(Path("/sys/block").glob("nbd*")) if not (disk / "pid").exists()), None)
    if free is None:
        raise Unavailable("all NBD devices are in use")
    path = f"/dev/{free.name}"
    command = [CLIENT, "-nonetlink", "-unix", str(socket), path, "-name", "bench", "-block-size", "512"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{CLIENT}: {done.stderr.strip() or done.stdout.strip()}")
    try:
        _wait(lambda: (free / "pid").exists() and int((free / "size").read_text()) > 0)
        yield path
    finally:
        subprocess.run([CLIENT, "-d", path], capture_output=True, check=False)
        _wait(lambda: not (free / "pid").exists())


def _wait(condition: Callable[[], bool]) -> None:
    """Raises Unavailable when it is still not so after a long time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise Unavailable(f"{DAEMON} or {CLIENT} did not get ready within {PATIENCE:.0f} s")
        time.sleep(0.01)
