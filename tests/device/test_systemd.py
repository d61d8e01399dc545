# SPDX-License-Identifier: MIT
"""The daemon as a service of a systemd: its deaths, and what only systemd's store of descriptors can bring back.

The systemd is a user manager of the test's own, with the unit as it is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blksnap_ublk.install import systemd_units
from blksnap_ublk.keeper.processes import read_processes
from tests.direct_io import read_at, write_at
from tests.loop_devices import missing_for_loops
from tests.own_daemon import PATIENCE, OwnDaemon, disks, wait_until

MIB = 1 << 20
MANAGER = next((path for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.path.exists(path)), None)
ROLES = ("keeper", "io", "control")


def _missing() -> str | None:
    if MANAGER is None or shutil.which("systemctl") is None:
        return "no systemd"
    if os.environ.get("BLKSNAP_GUEST") is None:
        return "not in a guest: the control groups of this machine are its own systemd's"
    return missing_for_loops()


missing = _missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


class Manager:
    """A systemd that runs the daemon as its unit."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        assert MANAGER is not None
        self._environment = os.environ | {
            "XDG_RUNTIME_DIR": str(folder / "xdg"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "HOME": str(folder / "home"),
        }
        for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "HOME"):
            Path(self._environment[name]).mkdir(mode=0o700)
        units = folder / "config/systemd/user"
        units.mkdir(parents=True)
        text = systemd_units.unit_texts(runtime, version=systemd_units.systemd_version())[systemd_units.DAEMON]
        variables = [f"BLKSNAP_UBLK_STATE={folder}/saved", "BLKSNAP_UBLK_LIFEBOAT_AFTER=0"]
        variables += [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []
        added = "".join(f"Environment={each}\n" for each in variables)
        (units / systemd_units.DAEMON).write_text(text.replace("[Service]\n", f"[Service]\n{added}"))
        (units / "default.target").write_text("[Unit]\nDescription=nothing\n")
        # A user manager asks whether the machine was started by systemd.
        Path("/run/systemd/system").mkdir(parents=True, exist_ok=True)
        self._log = (folder / "manager.log").open("w+")
        command = [MANAGER, "--user", "--log-target=console", "--unit=default.target"]
        self._process = subprocess.Popen(command, env=self._environment, stdout=self._log, stderr=self._log)
        wait_until("the manager listens", lambda: (folder / "xdg/systemd/private").exists())

    def systemctl(self, *arguments: str) -> str:
        """What it prints. It must succeed."""
        done = subprocess.run(
            ["systemctl", "--user", *arguments], env=self._environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}{self.log()}"
        return done.stdout.strip()

    def shows(self, name: str) -> str:
        """A property of the unit."""
        return self.systemctl("show", "--value", "-p", name, systemd_units.DAEMON)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def end(self) -> None:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.systemctl("stop", systemd_units.DAEMON)
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._log.close()


@pytest.fixture
def service(folder: Path) -> Iterator[tuple[Manager, OwnDaemon]]:
    """The manager, and the daemon that it has started."""
    runtime = folder / "run"
    manager = Manager(folder, runtime)
    try:
        manager.systemctl("start", systemd_units.DAEMON)
        yield manager, OwnDaemon(runtime, os.environ | {"BLKSNAP_UBLK_RUN": str(runtime)})
    finally:
        manager.end()


def _lives(daemon: OwnDaemon, role: str, former: int) -> bool:
    try:
        return daemon.pid(role) != former and Path(f"/proc/{daemon.pid(role)}").exists()
    except (KeyError, OSError):
        return False


def test_a_keeper_that_dies_is_started_by_systemd_and_finds_its_children(service: tuple[Manager, OwnDaemon]) -> None:
    manager, daemon = service
    with disks(16 * MIB) as disk:
        device = daemon.cli("attach", disk.origin).stdout.strip()
        pids = {role: daemon.pid(role) for role in ROLES}
        assert manager.shows("MainPID") == str(pids["keeper"])
        os.kill(pids["keeper"], signal.SIGKILL)
        wait_until("another keeper", lambda: _lives(daemon, "keeper", pids["keeper"]))
        wait_until("that it serves", lambda: manager.shows("ActiveState") == "active")
        assert manager.shows("MainPID") == str(daemon.pid("keeper"))
        assert [daemon.pid(role) for role in ("io", "control")] == [pids["io"], pids["control"]]
        write_at(device, 0, b"x" * MIB)
        done = daemon.cli("detach", device)
        assert done.returncode == 0, done.stderr


def test_an_unnamed_storage_outlives_the_death_of_all(service: tuple[Manager, OwnDaemon], folder: Path) -> None:
    manager, daemon = service
    with disks(16 * MIB) as disk:
        device = daemon.cli("attach", disk.origin).stdout.strip()
        write_at(device, 0, b"a" * MIB)
        made = daemon.cli("snapshot", "create", device, "--storage", str(folder), "--limit", "32M", "--print", "images")
        assert made.returncode == 0, made.stderr
        image = made.stdout.strip()
        write_at(device, 0, b"b" * MIB)
        kept = int(manager.shows("NFileDescriptorStore"))
        assert kept >= 3  # the origin, the storage, and what tells which is which
        # Spares included.
        members = read_processes(daemon.runtime / "state/processes").processes
        for member in members.values():
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
        wait_until("another keeper", lambda: _lives(daemon, "keeper", members["keeper"].pid))
        wait_until("that it serves", lambda: manager.shows("ActiveState") == "active")
        assert read_at(device, 0, MIB) == b"b" * MIB
        wait_until("the image serves", lambda: daemon.cli("snapshot", "list", "--json").returncode == 0)
        assert read_at(image, 0, MIB) == b"a" * MIB
        (snapshot,) = re.findall(r'"id": ?"([0-9a-f-]{36})"', daemon.cli("snapshot", "list", "--json").stdout)
        assert daemon.cli("snapshot", "check", snapshot).returncode == 0
        done = daemon.cli("snapshot", "destroy", snapshot)
        assert done.returncode == 0, done.stderr
        done = daemon.cli("detach", device)
        assert done.returncode == 0, done.stderr


def test_what_the_manager_keeps_is_in_nobodys_way(service: tuple[Manager, OwnDaemon], folder: Path) -> None:
    """It holds the descriptors of origins and storages, and lets go of them some time after they were dropped."""
    _, daemon = service
    storage = folder / "storage"
    storage.write_bytes(bytes(8 * MIB))
    with disks(16 * MIB) as disk:
        for _ in range(4):
            done = daemon.cli("attach", disk.origin)
            assert done.returncode == 0, done.stderr
            assert "has" not in done.stderr.split(), done.stderr  # nobody else "has it open"
            device = done.stdout.strip()
            made = daemon.cli("snapshot", "create", device, "--storage", str(storage))
            assert made.returncode == 0, made.stderr
            done = daemon.cli("snapshot", "destroy", made.stdout.strip())
            assert done.returncode == 0, done.stderr
            done = daemon.cli("detach", device)
            assert done.returncode == 0, done.stderr
