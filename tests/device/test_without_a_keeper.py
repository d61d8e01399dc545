# SPDX-License-Identifier: MIT
"""The keeper dies when nobody is ready to replace it, or ends the daemon when nobody is ready to end: all goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blksnap_ublk.client import connect
from blksnap_ublk.forms import DeviceState
from tests.fio_load import fio_load
from tests.killing import answers, kill
from tests.loop_devices import loop_device, missing_for_loops
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20

missing = missing_for_loops()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon() as running:
        yield running


def kill_control_and_see_another_one_start(daemon: OwnDaemon) -> None:
    """No spare is there to take over: the next one has to be started, which takes a moment."""
    former = daemon.pid("control")
    kill(daemon, "control", "control-spare")
    wait_until("another one starts", lambda: daemon.processes().living("control") is not None)
    assert daemon.pid("control") != former


def by_command(daemon: OwnDaemon) -> None:
    assert daemon.cli("list").returncode == 0


def by_client(_: OwnDaemon) -> None:
    with connect() as client:
        client.list_devices()


@pytest.mark.parametrize("ask", [by_command, by_client])
def test_whoever_asks_starts_a_keeper_where_nobody_else_is_left_to(
    daemon: OwnDaemon, folder: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[OwnDaemon], None]
) -> None:
    monkeypatch.setenv("BLKSNAP_UBLK_RUN", str(daemon.runtime))
    with loop_device(folder / "disk", 16 * MIB) as origin:
        with daemon.client() as client:
            device = client.attach(origin).device
        io = daemon.pid("io")
        with fio_load(device, size="8m") as load:
            kill(daemon, "keeper", "control", "control-spare")
            load.wait_for_round()  # io needs nobody
            ask(daemon)
            load.wait_for_round()
        assert daemon.pid("io") == io
        with daemon.client() as client:
            assert [each.state for each in client.list_devices()] == [DeviceState.LIVE]
            client.detach(device)


def test_a_control_process_that_finds_no_keeper_starts_one(daemon: OwnDaemon, folder: Path) -> None:
    with loop_device(folder / "disk", 16 * MIB) as origin:
        with daemon.client() as client:
            device = client.attach(origin).device
        for moment in (0.0, 0.5, 1.0, 2.0):
            kill_control_and_see_another_one_start(daemon)
            time.sleep(moment)
            kill(daemon, "keeper", "control-spare")
            wait_until("the daemon answers", lambda: answers(daemon))
        with daemon.client() as client:
            client.detach(device)


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0, 2.0])
def test_an_end_before_control_serves_again_leaves_nothing(daemon: OwnDaemon, folder: Path, moment: float) -> None:
    with loop_device(folder / "disk", 16 * MIB) as origin:
        with daemon.client() as client:
            client.attach(origin)
        kill_control_and_see_another_one_start(daemon)
        time.sleep(moment)
        try:
            daemon.end()
            assert not (daemon.runtime / "state").exists(), daemon.log()
            assert not list(Path("/sys/class/ublk-char").glob("*")), daemon.log()
        finally:
            daemon.start()
