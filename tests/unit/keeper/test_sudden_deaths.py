# SPDX-License-Identifier: MIT
"""A keeper dies in the middle of a change, or together with others: nobody is forgotten, nobody is left over."""

import os
import signal
import time
from pathlib import Path

import pytest

from blksnap_ublk.keeper.child import FORGOTTEN_LOOK
from blksnap_ublk.keeper.processes import read_processes
from blksnap_ublk.keeper.runtime import RuntimePaths
from tests.unit.keeper.fake_child import SLOW
from tests.unit.keeper.running import PATIENCE, Running, children, run, wait_until_gone

ROLES = ("io", "control", "io-spare", "control-spare")


@pytest.fixture
def paths(tmp_path: Path) -> RuntimePaths:
    return RuntimePaths(tmp_path / "run")


def recorded_children(paths: RuntimePaths) -> set[int]:
    return {member.pid for name, member in read_processes(paths.processes).processes.items() if name != "keeper"}


def wait_for_all_to_be_known(running: Running) -> None:
    """There are as many processes as there should be, and all of them are in the record."""
    end = time.monotonic() + PATIENCE
    while True:
        there, recorded = children(running.paths), recorded_children(running.paths)
        if there == recorded and len(there) == len(ROLES):
            return
        assert time.monotonic() < end, (there, read_processes(running.paths.processes))
        time.sleep(0.1)


@pytest.mark.parametrize("spare", ["io-spare", "control-spare"])
def test_a_spare_that_its_keeper_did_not_live_to_record_ends(paths: RuntimePaths, spare: str) -> None:
    with run(paths, "serve", "serve", "successor", f"dies-unrecorded={spare}") as running:
        io, control = running.recorded("io"), running.recorded("control")
        running.process.wait(PATIENCE)
        wait_for_all_to_be_known(running)
        assert (running.pid_of(paths.io_socket), running.pid_of(paths.varlink_socket)) == (io, control)


@pytest.mark.parametrize("role", ["io", "control"])
def test_a_successor_that_its_keeper_did_not_live_to_record_ends(paths: RuntimePaths, role: str) -> None:
    """It was no spare before: it would take the role without anybody who looks after it."""
    with run(paths) as running:
        victims = [running.recorded(role), running.spare(role)]
        running.kill()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
            wait_until_gone(victim)
        second = Running(paths, "serve", "serve", f"dies-unrecorded={role}")
        second.process.wait(PATIENCE)
        third = Running(paths)
        try:
            assert third.told == "0 ready"
            assert third.pid_of(paths.io_socket) == third.recorded("io")
            assert third.pid_of(paths.varlink_socket) == third.recorded("control")
            wait_for_all_to_be_known(third)
        finally:
            status, log = third.end()
        assert status == 0, log
        assert list(paths.root.iterdir()) == []


def test_spares_that_did_not_stand_by_yet_outlive_their_keeper(paths: RuntimePaths) -> None:
    with run(paths, "slow", "slow") as running:
        before = {role: running.recorded(role) for role in ROLES}
        running.kill()
        time.sleep(SLOW + 2 * FORGOTTEN_LOOK)
        second = Running(paths)
        try:
            assert {role: second.recorded(role) for role in ROLES} == before
            os.kill(before["io"], signal.SIGKILL)
            assert running.pid_of(paths.io_socket) == before["io-spare"]
        finally:
            status, log = second.end()
        assert status == 0, log


@pytest.mark.parametrize("role", ["io", "control"])
def test_who_was_recorded_and_not_told_is_told_by_the_next_keeper(paths: RuntimePaths, role: str) -> None:
    with run(paths, "serve", "serve", "successor", "dies-untold=3") as running:
        path = paths.io_socket if role == "io" else paths.varlink_socket
        others = running.spare("control" if role == "io" else "io")
        spare = running.spare(role)
        os.kill(running.recorded(role), signal.SIGKILL)
        running.process.wait(PATIENCE)
        assert running.pid_of(path) == spare
        wait_for_all_to_be_known(running)
        assert others in children(paths)


def test_a_keeper_that_dies_while_it_adopts_loses_nobody(paths: RuntimePaths) -> None:
    with run(paths) as running:
        before = {role: running.spare(role.removesuffix("-spare")) for role in ROLES if role.endswith("-spare")}
        before |= {role: running.recorded(role) for role in ("io", "control")}
        running.kill()
        second = Running(paths, "serve", "serve", "dies-recorded")
        assert second.process.wait(PATIENCE) == -signal.SIGKILL
        third = Running(paths)
        try:
            assert third.told == "0 ready"
            assert {role: third.recorded(role) for role in before} == before
            assert children(paths) == set(before.values())
        finally:
            third.end()


def test_an_end_that_comes_before_control_serves_is_an_orderly_one(paths: RuntimePaths) -> None:
    with run(paths) as running:
        former = running.recorded("control")
        os.kill(former, signal.SIGKILL)
        wait_until_gone(former)
        while running.recorded("control") == former:
            time.sleep(0.001)
        status, log = running.end()
        assert status == 0, log
        assert list(paths.root.iterdir()) == []
        assert children(paths) == set()


@pytest.mark.parametrize("status", ["0", "10"])
def test_a_daemon_that_has_ended_in_order_is_succeeded_by_nobody(paths: RuntimePaths, status: str) -> None:
    with run(paths, "serve", f"serve {status}") as running:
        running.end()
        left = sorted(paths.root.iterdir())
        second = Running(paths, "serve", "serve", "succeeds")
        assert second.process.wait(PATIENCE) == 1
        assert second.told == "1 the daemon has ended in good order meanwhile"
        assert sorted(paths.root.iterdir()) == left
        assert children(paths) == set()


def test_who_looks_for_a_keeper_that_is_yet_to_come_does_not_end(paths: RuntimePaths) -> None:
    """The spare of control, alone of all: it is who starts the next keeper."""
    with run(paths, "serve", "serve", "successor") as running:
        victims = [running.recorded(role) for role in ("io", "control", "keeper")]
        victims.append(running.spare("io"))
        spare = running.spare("control")
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        for victim in victims:
            wait_until_gone(victim) if victim != running.process.pid else running.process.wait(PATIENCE)
        assert running.pid_of(paths.varlink_socket) == spare
        assert running.pid_of(paths.io_socket) == running.recorded("io")
        wait_for_all_to_be_known(running)
