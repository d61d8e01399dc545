# SPDX-License-Identifier: MIT
"""Whoever of the daemon dies, somebody takes over: spares, lifeboats, another keeper, another version."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.layout import LAYOUT
from blksnap_ublk.keeper.runtime import RuntimePaths
from tests.unit.keeper.running import PATIENCE, Running, alive, end_all, run, wait_until_gone


@pytest.fixture
def paths(tmp_path: Path) -> RuntimePaths:
    return RuntimePaths(tmp_path / "run")


@pytest.mark.parametrize("name", ["io", "control"])
def test_the_spare_takes_over_and_there_is_another_one(paths: RuntimePaths, name: str) -> None:
    with run(paths) as running:
        path = paths.io_socket if name == "io" else paths.varlink_socket
        spare = running.spare(name)
        first = running.pid_of(path)
        assert first == running.recorded(name)
        os.kill(first, signal.SIGKILL)
        assert running.pid_of(path) == spare
        assert running.recorded(name) == spare
        assert running.spare(name) not in (first, spare)


def test_a_spare_that_dies_is_replaced(paths: RuntimePaths) -> None:
    with run(paths) as running:
        spare = running.spare("io")
        serving = running.pid_of(paths.io_socket)
        os.kill(spare, signal.SIGKILL)
        wait_until_gone(spare)
        assert running.spare("io") != spare
        assert running.pid_of(paths.io_socket) == serving


def test_the_third_death_of_io_makes_a_lifeboat(paths: RuntimePaths) -> None:
    with run(paths) as running:
        for _ in range(3):
            answer = running.answer_of(paths.io_socket)
            assert not answer.endswith("!")
            os.kill(int(answer), signal.SIGKILL)
            wait_until_gone(int(answer))
        assert running.answer_of(paths.io_socket).endswith("!")
        assert not running.answer_of(paths.varlink_socket).endswith("!")


def test_a_keeper_that_dies_is_replaced_by_control_and_its_children_go_on(paths: RuntimePaths, tmp_path: Path) -> None:
    with run(paths, "serve", "serve", "successor") as running:
        before = {role: running.recorded(role) for role in ("keeper", "io", "control")}
        spares = {role: running.spare(role) for role in ("io", "control")}
        with KeeperClient(paths.keeper_socket) as client, open(tmp_path / "file", "w+b") as file:
            client.put("storage:a", file.fileno())
            assert not client.lost()
            running.kill()
            wait_until_gone(before["keeper"])
            assert client.lost()
            assert client.names() == []  # the next keeper has answered; io holds nothing here
            assert client.lost()  # until what was put is put again
            client.reconnect()
            assert not client.lost()
            client.put("storage:a", file.fileno())
            assert client.names() == ["storage:a"]
        assert running.recorded("keeper") != before["keeper"]
        assert running.pid_of(paths.io_socket) == before["io"]
        assert running.pid_of(paths.varlink_socket) == before["control"]
        # The next keeper does for them what the former one did.
        for role, path in (("io", paths.io_socket), ("control", paths.varlink_socket)):
            os.kill(before[role], signal.SIGKILL)
            assert running.pid_of(path) == spares[role]
            assert running.spare(role) != spares[role]
        with KeeperClient(paths.keeper_socket) as client:
            client.stop()
        wait_until_gone(running.recorded("keeper"))
        assert list(paths.root.iterdir()) == []


def test_keeper_and_control_may_die_at_once(paths: RuntimePaths) -> None:
    with run(paths, "serve", "serve", "successor") as running:
        io, control, spare = running.recorded("io"), running.recorded("control"), running.spare("control")
        running.process.kill()
        os.kill(control, signal.SIGKILL)
        running.process.wait(PATIENCE)
        assert running.pid_of(paths.varlink_socket) == spare
        assert running.pid_of(paths.io_socket) == io


def test_a_keeper_that_is_started_by_hand_adopts_what_lives(paths: RuntimePaths) -> None:
    with run(paths) as running:
        io, control = running.recorded("io"), running.recorded("control")
        io_spare = running.spare("io")
        running.kill()
        os.kill(io, signal.SIGKILL)
        wait_until_gone(io)
        second = Running(paths)
        try:
            assert second.told == "0 ready"
            assert running.pid_of(paths.varlink_socket) == control
            assert running.pid_of(paths.io_socket) == io_spare
        finally:
            status, log = second.end()
        assert status == 0, log
        assert "adopting" in log
        assert list(paths.root.iterdir()) == []


def test_all_may_die_at_once(paths: RuntimePaths) -> None:
    with run(paths) as running:
        running.spare("io")
        running.spare("control")
        (paths.state / "catalogue").touch()
        end_all(paths)
        running.process.wait(PATIENCE)
        second = Running(paths)
        try:
            assert second.told == "0 ready"
            assert not second.answer_of(paths.io_socket).endswith("!")
            assert (paths.state / "catalogue").exists()
            (paths.state / "catalogue").unlink()
        finally:
            second.end()


def test_a_takeover_replaces_all_three_and_keeps_what_is_held(paths: RuntimePaths, tmp_path: Path) -> None:
    with run(paths) as running:
        before = {role: running.recorded(role) for role in ("keeper", "io", "control")}
        with KeeperClient(paths.keeper_socket) as client, open(tmp_path / "file", "w+b") as file:
            client.put("origin:a", file.fileno())
            second = Running(paths, "serve", "serve", "takeover")
            assert second.told == "0 ready"
            assert running.process.wait(PATIENCE) == 0
            assert client.names() == ["origin:a"]
        after = {role: second.recorded(role) for role in before}
        assert not set(before.values()) & set(after.values())
        assert second.pid_of(paths.io_socket) == after["io"]
        assert second.pid_of(paths.varlink_socket) == after["control"]
        assert not any(alive(pid) for pid in before.values())
        os.kill(after["io"], signal.SIGKILL)
        assert second.pid_of(paths.io_socket) != after["io"]
        status, log = second.end()
        assert status == 0, log
        assert list(paths.root.iterdir()) == []


@pytest.mark.parametrize(
    ("io_mode", "layout", "told"),
    [
        ("die", str(LAYOUT), "1 the io process ended at its start (exit status 3)"),
        ("refuse 5 'no io_uring here'", str(LAYOUT), "5 no io_uring here"),
        ("serve", "999", "1 the state is of layout '999', this version reads layout"),
        ("serve", "", "1 the state is of layout ''"),
    ],
)
def test_a_takeover_that_fails_changes_nothing(paths: RuntimePaths, io_mode: str, layout: str, told: str) -> None:
    with run(paths) as running:
        paths.layout.write_text(layout)
        before = {role: running.recorded(role) for role in ("keeper", "io", "control")}
        spares = {role: running.spare(role) for role in ("io", "control")}
        second = Running(paths, io_mode, "serve", "takeover")
        assert second.told.startswith(told)
        assert second.process.wait(PATIENCE) == int(told[0])
        assert {role: running.recorded(role) for role in before} == before
        assert {role: running.spare(role) for role in spares} == spares
        assert running.pid_of(paths.io_socket) == before["io"]
        with KeeperClient(paths.keeper_socket) as client:
            assert client.names() == []


def test_a_takeover_needs_a_daemon(paths: RuntimePaths) -> None:
    running = Running(paths, "serve", "serve", "takeover")
    assert running.told == "1 the daemon does not run; `serve` starts it"
    assert running.process.wait(PATIENCE) == 1


def test_a_log_that_nobody_reads_makes_nobody_wait(paths: RuntimePaths) -> None:
    """Its writer is stuck in a file without a reader; keeper and children fill the pipe before it, and go on."""
    paths.root.mkdir(mode=0o700)
    os.mkfifo(paths.log)
    with run(paths, "talk", "talk", "log") as running:
        io = running.pid_of(paths.io_socket)
        time.sleep(0.5)  # a megabyte is long full
        assert running.pid_of(paths.io_socket) == io
        os.kill(io, signal.SIGKILL)
        assert running.pid_of(paths.io_socket) != io
        reader = os.open(paths.log, os.O_RDONLY | os.O_NONBLOCK)
        text = b""
        while b"messages are missing here" not in text:
            try:
                text += os.read(reader, 1 << 16)
            except BlockingIOError:
                time.sleep(0.01)
        os.close(reader)


def test_a_log_writer_that_dies_is_replaced(paths: RuntimePaths) -> None:
    with run(paths, "talk", "serve", "log") as running:
        children = subprocess.run(
            ["pgrep", "-P", str(running.process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        writers = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "blksnap-log\n"]
        assert len(writers) == 1
        os.kill(int(writers[0]), signal.SIGKILL)
        wait_until_gone(int(writers[0]))
        size = paths.log.stat().st_size
        end = time.monotonic() + PATIENCE
        while paths.log.stat().st_size == size:
            assert time.monotonic() < end, "nothing is logged any more"
            time.sleep(0.02)
