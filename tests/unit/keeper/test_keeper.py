# SPDX-License-Identifier: MIT
"""A real keeper with harmless children: its start, what it holds, deaths of its children, its end."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.runtime import RuntimePaths
from tests.unit.keeper.running import PATIENCE, Running, alive


@pytest.fixture
def paths(tmp_path: Path) -> RuntimePaths:
    return RuntimePaths(tmp_path / "run")


@pytest.fixture
def running(paths: RuntimePaths) -> Iterator[Running]:
    running = Running(paths)
    assert running.told == "0 ready"
    yield running
    if running.process.poll() is None:
        running.end()


def test_a_clean_end_leaves_nothing(running: Running) -> None:
    children = [running.pid_of(running.paths.io_socket), running.pid_of(running.paths.varlink_socket)]
    assert {path.name for path in running.paths.state.iterdir()} >= {"processes", "layout"}
    assert {path.name for path in running.paths.root.iterdir()} == {
        "daemon.lock",
        "io.blksnap.Ublk",
        "io.sock",
        "keeper.sock",
        "state",
    }
    assert running.paths.root.stat().st_mode & 0o777 == 0o700
    status, log = running.end()
    assert status == 0, log
    assert list(running.paths.root.iterdir()) == []
    assert not any(alive(pid) for pid in children)


def test_descriptors_are_held_over_connections_and_deaths(running: Running, tmp_path: Path) -> None:
    (tmp_path / "origin").write_bytes(b"data")
    with KeeperClient(running.paths.keeper_socket) as client, open(tmp_path / "origin", "rb") as file:
        client.put("origin:a", file.fileno())
        client.put("origin:b", file.fileno())
    os.kill(running.pid_of(running.paths.varlink_socket), signal.SIGKILL)
    os.kill(running.pid_of(running.paths.io_socket), signal.SIGKILL)
    with KeeperClient(running.paths.keeper_socket) as client:
        assert client.names() == ["origin:a", "origin:b"]
        client.drop("origin:b")
        assert client.names() == ["origin:a"]
        descriptor = client.get("origin:a")
        assert os.pread(descriptor, 4, 0) == b"data"
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
        with open(tmp_path / "run" / "other", "w+b") as other:
            other.write(b"more")
            other.flush()
            client.put("origin:a", other.fileno())
        descriptor = client.get("origin:a")
        assert os.pread(descriptor, 4, 0) == b"more"
        os.close(descriptor)
        for ask in (client.get, client.drop):
            with pytest.raises(OSError, match="'origin:x'") as caught:
                ask("origin:x")
            assert caught.value.errno == errno.ENOENT
        with pytest.raises(OSError, match="name of 1 to 255") as caught:
            client.put("", 0)
        assert caught.value.errno == errno.EINVAL


def test_the_keeper_holds_no_more_descriptors_than_named(running: Running, tmp_path: Path) -> None:
    folder = Path(f"/proc/{running.process.pid}/fd")
    with KeeperClient(running.paths.keeper_socket) as client, open(tmp_path / "f", "w+b") as file:
        client.put("x", file.fileno())
        before = len(list(folder.iterdir()))
        for _ in range(200):
            client.put("x", file.fileno())
            os.close(client.get("x"))
        assert len(list(folder.iterdir())) == before
        client.drop("x")
        assert len(list(folder.iterdir())) == before - 1


@pytest.mark.parametrize("name", ["io_socket", "varlink_socket"])
def test_a_killed_child_is_started_again_and_no_connection_is_refused(running: Running, name: str) -> None:
    path: Path = getattr(running.paths, name)
    other = running.paths.varlink_socket if name == "io_socket" else running.paths.io_socket
    unharmed = running.pid_of(other)
    first = running.pid_of(path)
    os.kill(first, signal.SIGKILL)
    second = running.pid_of(path)
    assert second != first
    assert running.pid_of(other) == unharmed


def test_a_child_that_dies_again_and_again_comes_back_each_time(running: Running) -> None:
    seen = set()
    for _ in range(4):
        pid = running.pid_of(running.paths.varlink_socket)
        seen.add(pid)
        os.kill(pid, signal.SIGKILL)
    running.pid_of(running.paths.varlink_socket)
    assert len(seen) == 4
    status, log = running.end()
    assert status == 0
    assert log.count("killed by SIGKILL") == 4
    assert "in 0.5 s" in log


def test_a_second_daemon_is_told_who_runs(running: Running) -> None:
    second = Running(running.paths)
    assert second.process.wait(PATIENCE) == 4
    assert second.told == f"4 already running (pid {running.process.pid})"
    assert running.pid_of(running.paths.io_socket)


@pytest.mark.parametrize(
    ("io_mode", "control_mode", "told"),
    [
        ("refuse 5 'no io_uring here'", "serve", "5 no io_uring here"),
        ("serve", "refuse 1 'the catalogue is unreadable'", "1 the catalogue is unreadable"),
        ("die", "serve", "1 the io process ended at its start (exit status 3)"),
        ("serve", "die", "1 the control process ended at its start (exit status 3)"),
    ],
)
def test_a_failed_start_tells_why_and_leaves_nothing(
    paths: RuntimePaths, io_mode: str, control_mode: str, told: str
) -> None:
    running = Running(paths, io_mode, control_mode)
    assert running.told == told
    assert running.process.wait(PATIENCE) == int(told[0])
    assert list(paths.root.iterdir()) == []


def test_a_child_that_is_no_program_fails_the_start(paths: RuntimePaths) -> None:
    code = (
        "import sys\n"
        "from blksnap_ublk.keeper.keeper import Keeper, KeeperConfig\n"
        "from blksnap_ublk.keeper.runtime import RuntimePaths\n"
        "config = KeeperConfig(RuntimePaths(sys.argv[1]), ['/nonexistent'], ['/nonexistent'], mount_state=False)\n"
        "sys.exit(Keeper(config, lambda code, text: print(code, text)).run())\n"
    )
    command = [sys.executable, "-c", code, str(paths.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stdout.startswith("1 the program cannot be run: [Errno 2]")
    assert list(paths.root.iterdir()) == []


def test_state_stays_when_control_says_that_devices_are_left(paths: RuntimePaths) -> None:
    running = Running(paths, "serve", "serve 10")
    assert running.told == "0 ready"
    (paths.state / "catalogue").write_text("{}")
    status, log = running.end(signal.SIGINT)
    assert status == 0
    assert "left for recovery" in log
    assert (paths.state / "catalogue").read_text() == "{}"
    assert not paths.lock.exists()


def test_a_second_signal_leaves_at_once(paths: RuntimePaths) -> None:
    running = Running(paths, "serve", "deaf")
    pids = [running.pid_of(paths.io_socket), running.pid_of(paths.varlink_socket)]
    running.process.send_signal(signal.SIGTERM)
    with KeeperClient(paths.keeper_socket) as client:
        client.stop()  # already ending: no second signal
        assert alive(pids[1])
    status, log = running.end()
    assert status == 0
    assert "told twice" in log
    for pid in pids:
        while alive(pid):
            os.sched_yield()


def test_stop_by_message_is_an_end_like_any_other(running: Running) -> None:
    with KeeperClient(running.paths.keeper_socket) as client:
        client.stop()
    assert running.process.wait(PATIENCE) == 0
    assert list(running.paths.root.iterdir()) == []


def test_who_has_waited_for_a_keeper_in_vain_goes_on_with_the_next_one(paths: RuntimePaths) -> None:
    running = Running(paths)
    with KeeperClient(paths.keeper_socket, patience=0.2) as client:
        assert client.names() == []
        running.end()
        for _ in range(2):
            with pytest.raises(ConnectionError, match="has gone"):
                client.names()
            with pytest.raises(ConnectionError, match="has gone"):
                client.reconnect()
        assert client.lost()
        running = Running(paths)
        assert client.names() == []
        assert client.lost()
        client.reconnect()
        assert not client.lost()
        running.end()


def test_a_directory_that_others_may_write_to_is_refused(paths: RuntimePaths) -> None:
    paths.root.mkdir()
    paths.root.chmod(0o777)
    running = Running(paths)
    assert running.told.startswith("1 the daemon cannot be started: ")
    assert "chmod 0700" in running.told
    assert running.process.wait(PATIENCE) == 1
