# SPDX-License-Identifier: MIT
"""The tmpfs of the state: of the host and of the daemon's own namespace, outlives the daemon, goes when it may."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk.keeper.processes import read_processes
from blksnap_ublk.keeper.runtime import RuntimePaths
from tests.unit.keeper.running import wait_until_gone

RUN_KEEPER = Path(__file__).with_name("run_keeper.py")
PATIENCE = 30


class Host:
    """A mount namespace that stands for the host's; a process keeps it."""

    def __init__(self, propagation: str) -> None:
        self.propagates = propagation == "shared"
        command = ["unshare", "--mount", "--propagation", propagation, "cat"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"x")
        self._process.stdin.flush()
        assert self._process.stdout.read(1) == b"x"
        self.pid = self._process.pid
        self.enter = ["nsenter", "--mount", f"--target={self.pid}"]

    def run(self, *command: str | Path) -> None:
        subprocess.run([*self.enter, *command], check=True)

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE)


def mounts(pid: int) -> dict[str, str]:
    """Mount point to file system and options, as process `pid` sees it."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        found[before.split()[4]] = f"{before.split()[5]} {after}"
    return found


def namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/mnt")


def missing() -> str | None:
    """Why no mount namespace can be made here, or None."""
    if os.geteuid() != 0:
        return "not root"
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        return "no unshare or nsenter"
    done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return None if done.returncode == 0 else "a container that may not mount"


MISSING = missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(params=["shared", "private"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    host = Host(request.param)
    yield host
    host.close()


@pytest.fixture
def paths(tmp_path: Path) -> RuntimePaths:
    return RuntimePaths(tmp_path / "run")


@contextlib.contextmanager
def keeper(host: Host, paths: RuntimePaths, *modes: str) -> Iterator[int]:
    """A keeper that was started in the namespace of `host`, ended by SIGTERM; its pid."""
    command = [*host.enter, sys.executable, str(RUN_KEEPER), str(paths.root), *(modes or ("serve", "serve")), "mount"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = process.stdout.readline()
    try:
        assert told == "0 ready\n"
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, log


def test_it_is_private_bounded_and_removed_at_a_clean_end(host: Host, paths: RuntimePaths) -> None:
    with keeper(host, paths) as pid:
        seen = mounts(host.pid)[str(paths.state)]
        assert "tmpfs" in seen
        assert "size=1024k" in seen
        assert "mode=700" in seen
        assert all(option in seen for option in ("nosuid", "nodev", "noexec"))
        assert str(paths.state) in mounts(pid)
    assert str(paths.state) not in mounts(host.pid)
    assert list(paths.root.iterdir()) == []


def test_it_stays_for_recovery_and_is_found_again(host: Host, paths: RuntimePaths) -> None:
    with keeper(host, paths, "serve", "serve 10") as pid:
        (Path(f"/proc/{pid}/root{paths.state}") / "catalogue").write_text("kept")
    host.run("grep", "-q", "kept", paths.state / "catalogue")
    with keeper(host, paths) as pid:
        assert (Path(f"/proc/{pid}/root{paths.state}") / "catalogue").read_text() == "kept"
        points = [line.split()[4] for line in Path(f"/proc/{host.pid}/mountinfo").read_text().splitlines()]
        assert points.count(str(paths.state)) == 1
        (Path(f"/proc/{pid}/root{paths.state}") / "catalogue").unlink()
    assert str(paths.state) not in mounts(host.pid)


def test_another_file_system_in_its_place_is_refused(host: Host, paths: RuntimePaths) -> None:
    paths.state.mkdir(parents=True, mode=0o700)
    paths.root.chmod(0o700)
    host.run("mount", "-t", "ramfs", "none", paths.state)
    command = [*host.enter, sys.executable, str(RUN_KEEPER), str(paths.root), "serve", "serve", "mount"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "a ramfs file system is mounted here; unmount it" in done.stdout
    host.run("umount", paths.state)


def test_the_daemon_sees_the_mounts_of_the_host_and_pins_none(host: Host, paths: RuntimePaths, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    host.run("mount", "-t", "tmpfs", "none", before)
    with keeper(host, paths) as pid:
        assert (namespace(pid) != namespace(host.pid)) == host.propagates
        assert str(before) in mounts(pid)
        host.run("umount", before)
        assert str(before) not in mounts(pid)
        host.run("mount", "-t", "tmpfs", "none", after)
        assert str(after) in mounts(pid)
        host.run("umount", after)
        assert str(after) not in mounts(pid)


def test_a_keeper_that_control_starts_removes_it_from_the_host_as_well(host: Host, paths: RuntimePaths) -> None:
    """Control is in the daemon's namespace, and the next keeper has to begin in that of the host."""
    arguments = [str(paths.root), "serve", "serve", "mount", "successor"]
    command = [*host.enter, sys.executable, str(RUN_KEEPER), *arguments]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "0 ready\n"
    processes = Path(f"/proc/{first.pid}/root{paths.processes}")
    control = read_processes(processes).processes["control"]
    first.kill()
    first.communicate(timeout=PATIENCE)
    processes = Path(f"/proc/{control.pid}/root{paths.processes}")
    end = time.monotonic() + PATIENCE
    while (keeper := read_processes(processes).living("keeper")) is None:
        assert time.monotonic() < end, "no other keeper"
        time.sleep(0.02)
    assert (namespace(keeper.pid) != namespace(host.pid)) == host.propagates
    assert read_processes(processes).living("control") == control
    os.kill(keeper.pid, signal.SIGTERM)
    wait_until_gone(keeper.pid)
    assert str(paths.state) not in mounts(host.pid)
    assert list(paths.root.iterdir()) == []
