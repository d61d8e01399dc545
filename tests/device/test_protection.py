# SPDX-License-Identifier: MIT
"""Whoever a filtered device needs never waits for memory that only this device could make free."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.keeper.child import STANDS_BY
from tests.killing import EVERYBODY, SPARES, kill_and_wait
from tests.loop_devices import loop_device, missing_for_loops
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
PR_SET_IO_FLUSHER = 57
CHILDREN = ("blksnap_ublk.ioproc.main", "blksnap_ublk.daemon.control")

missing = missing_for_loops()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


def flags_of(stat: Path) -> int:
    """The kernel's PF_ flags of a process or a thread."""
    return int(stat.read_text().rpartition(")")[2].split()[6])


@pytest.fixture(scope="module")
def flusher() -> int:
    """The flags that an I/O flusher has with this kernel."""
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        seen = []
        for on in (1, 0):
            ctypes.CDLL(None).prctl(PR_SET_IO_FLUSHER, *map(ctypes.c_ulong, (on, 0, 0, 0)))
            seen.append(flags_of(Path("/proc/self/stat")))
        os.write(say, str(seen[0] & ~seen[1]).encode())
        os._exit(0)
    os.close(say)
    os.waitpid(child, 0)
    with open(hear, encoding="ascii") as pipe:
        flags = int(pipe.read())
    assert flags, "a process may not be one here"
    return flags


def kib(pid: int, name: str) -> int:
    """A line of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(name + ":")))


def expect_flushers(pid: int, flusher: int, who: str) -> None:
    """All of its threads are I/O flushers."""
    threads = {int(stat.parent.name): flags_of(stat) for stat in Path(f"/proc/{pid}/task").glob("*/stat")}
    assert threads
    assert [tid for tid, flags in threads.items() if flags & flusher != flusher] == [], f"threads of {who}"


def expect_locked(pid: int, who: str) -> None:
    """What it has touched stays in memory."""
    wait_until(f"{who} has locked its memory", lambda: kib(pid, "VmLck") > 0)
    assert kib(pid, "VmLck") >= kib(pid, "VmRSS") * 9 // 10, who
    assert kib(pid, "VmSwap") == 0, who


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon() as running:
        yield running


def wait_for_spares(daemon: OwnDaemon) -> None:
    """Both are there."""
    wait_until("spares", lambda: all(daemon.processes().living(role) is not None for role in SPARES))


@contextmanager
def served(daemon: OwnDaemon, origin: str, folder: Path) -> Iterator[None]:
    """A filtered device with a snapshot: all threads are there."""
    with daemon.client() as client:
        device = client.attach(origin).device
        client.create_snapshot([device], storage=[str(folder)], limit=16 * MIB)
    try:
        yield
    finally:
        with daemon.client() as client:
            client.detach(device, force=True)


def test_all_processes_are_protected_also_those_that_come_later(daemon: OwnDaemon, folder: Path, flusher: int) -> None:
    with loop_device(folder / "disk", 8 * MIB) as origin, served(daemon, origin, folder):
        for victims in ((), ("keeper",), ("io", "control"), ("keeper",)):
            if victims:
                kill_and_wait(daemon, *victims)
            wait_for_spares(daemon)
            for role in EVERYBODY:
                expect_flushers(daemon.pid(role), flusher, f"{role} after the death of {victims}")
                expect_locked(daemon.pid(role), f"{role} after the death of {victims}")


@contextmanager
def standing_by(module: str, runtime: Path) -> Iterator[int]:
    """A child as the keeper starts it, but that nobody above it is protected; its pid."""
    (runtime / "state").mkdir()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    hear, say = os.pipe()
    arguments = ["--runtime", str(runtime), "--listener", str(listener.fileno()), "--ready", str(say)]
    process = started(module, arguments, [listener.fileno(), say])
    os.close(say)
    try:
        with open(hear, encoding="utf-8") as pipe:
            assert pipe.readline() == STANDS_BY + "\n"
            yield process.pid
    finally:
        listener.close()
        process.kill()
        process.wait()


def started(module: str, arguments: Sequence[str], inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], pass_fds=inherited)


@pytest.mark.parametrize("module", CHILDREN)
def test_each_child_sees_to_it_by_itself(module: str, folder: Path, flusher: int) -> None:
    with standing_by(module, folder) as pid:
        # Libraries may have threads of their own already, which do nothing.
        assert flags_of(Path(f"/proc/{pid}/stat")) & flusher == flusher
        expect_locked(pid, module)
