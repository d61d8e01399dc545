# SPDX-License-Identifier: MIT
"""`serve --takeover` under load; and that control needs no program file once it stands by."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk.keeper.processes import read_processes
from tests.direct_io import read_at, write_at
from tests.fio_load import fio_load
from tests.own_daemon import Disks, OwnDaemon, disks, own_daemon, wait_until
from tests.unit.keeper.running import wait_until_gone

MIB = 1 << 20
SIZE = 48 * MIB
ROLES = ("keeper", "io", "control")
TAKEOVERS = int(os.environ.get("BSU_TAKEOVERS", "3"))


@pytest.fixture
def two() -> Iterator[Disks]:
    with disks(SIZE) as found:
        yield found


@pytest.fixture
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon() as running:
        yield running


def processes(daemon: OwnDaemon) -> dict[str, int]:
    return {role: daemon.pid(role) for role in ROLES}


def wait_for_spares(daemon: OwnDaemon) -> None:
    def there() -> bool:
        record = read_processes(daemon.runtime / "state" / "processes")
        return all(record.living(f"{role}-spare") is not None for role in ("io", "control"))

    wait_until("spares are there", there)
    time.sleep(1)


def names_in(file: Path) -> set[str]:
    return set(file.read_text().split()) if file.exists() else set()


def digest(path: str) -> str:
    return hashlib.sha256(b"".join(read_at(path, start, MIB) for start in range(0, SIZE, MIB))).hexdigest()


def test_a_running_daemon_is_replaced_under_load(daemon: OwnDaemon, two: Disks) -> None:
    """fio verifies what it wrote, an image stays what it was, and nobody of the former daemon is left."""
    device = daemon.cli("attach", two.origin).stdout.strip()
    for start in range(0, SIZE, MIB):
        write_at(device, start, bytes([start // MIB]) * MIB)
    done = daemon.cli("snapshot", "create", device, "--storage", str(two.directory), "--no-freeze", "--json")
    image = json.loads(done.stdout)["images"][0]["image"]
    before = digest(image)
    with fio_load(device) as load:
        load.wait_for_round()
        for _ in range(TAKEOVERS):
            former = processes(daemon)
            done = daemon.cli("serve", "--takeover", "--json")
            assert done.returncode == 0, done.stderr + daemon.log()
            assert json.loads(done.stdout)["pause_ms"] >= 0
            assert not set(former.values()) & set(processes(daemon).values())
            for pid in former.values():
                wait_until_gone(pid)
            load.wait_for_round()
            assert digest(image) == before
    shown = json.loads(daemon.cli("list", "--json").stdout)["devices"][0]
    assert shown["state"] == "live"
    shown = json.loads(daemon.cli("snapshot", "list", "--json").stdout)["snapshots"][0]
    assert shown["state"] == "active", shown
    # Spares of both have come and gone: there is one of each role, and what is dead is not waited for.
    wait_for_spares(daemon)
    os.kill(daemon.pid("io"), signal.SIGKILL)
    assert digest(image) == before


def test_a_takeover_by_a_version_that_cannot_read_the_state_is_refused(daemon: OwnDaemon, two: Disks) -> None:
    device = daemon.cli("attach", two.origin).stdout.strip()
    layout = daemon.runtime / "state" / "layout"
    ours = layout.read_text()
    layout.write_text("1000\n")
    former = processes(daemon)
    done = daemon.cli("serve", "--takeover")
    assert done.returncode == 1
    assert "the state is of layout '1000', this version reads layout" in done.stderr
    assert processes(daemon) == former
    write_at(device, 0, b"x" * 4096)
    layout.write_text(ours)


WATCH_IMPORTS = """
import os, sys
def hook(event, arguments):
    if event == "import":
        with open(os.path.join(os.environ["IMPORTS"], str(os.getpid())), "a") as file:
            print(arguments[0], file=file)
if "blksnap_ublk.daemon.control" in sys.orig_argv or "blksnap_ublk.ioproc.main" in sys.orig_argv:
    sys.addaudithook(hook)
"""


def test_nothing_is_imported_once_a_process_stands_by(
    two: Disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program may lie on a device that waits for exactly this process."""
    (tmp_path / "sitecustomize.py").write_text(WATCH_IMPORTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("IMPORTS", str(tmp_path))
    with own_daemon() as daemon:
        wait_for_spares(daemon)
        pids = [daemon.pid(role) for role in ("io", "control", "io-spare", "control-spare")]
        files = [tmp_path / str(pid) for pid in pids]
        assert all("blksnap_ublk" in file.read_text() for file in files[:2])
        for active, spare in ((0, 2), (1, 3)):
            wait_until_imported(files[active], files[spare])
        before = [file.read_text() for file in files]
        device = daemon.cli("attach", two.origin).stdout.strip()
        storage = str(two.directory / "storage")
        made = daemon.cli(
            "snapshot", "create", device, "--storage", str(two.directory), "--limit", "16M", "--no-freeze"
        )
        assert made.returncode == 0, made.stderr
        work(daemon, device, storage)
        os.kill(pids[0], signal.SIGKILL)
        write_at(device, 0, b"x" * 4096)
        os.kill(pids[1], signal.SIGKILL)
        work(daemon, device, storage)
        assert [daemon.pid("io"), daemon.pid("control")] == pids[2:]
        assert daemon.cli("snapshot", "destroy", made.stdout.strip(), "--force").returncode == 0
        assert daemon.cli("detach", device).returncode == 0
        imported = [set(file.read_text().removeprefix(text).split()) for file, text in zip(files, before, strict=True)]
        assert imported == [set()] * 4


def wait_until_imported(active: Path, spare: Path) -> None:
    wait_until("the spare has imported all", lambda: names_in(spare) >= names_in(active))


def work(daemon: OwnDaemon, device: str, storage: str) -> None:
    """All kinds of commands, some in vain."""
    for arguments in (
        ("snapshot", "create", device, "--storage-file", storage, "--limit", "16M"),
        ("snapshot", "create", "/dev/null", "--storage", storage),
        ("snapshot", "list"),
        ("status",),
        ("list",),
        ("changes", "info", device),
        ("changes", "show", device, "--since", "none"),
        ("changes", "mark", device, "--range", "0+4096"),
        ("changes", "dump", device, f"{storage}.npy"),
        ("events",),
        ("version",),
    ):
        daemon.cli(*arguments)
    for entry in json.loads(daemon.cli("snapshot", "list", "--json").stdout)["snapshots"][1:]:
        daemon.cli("snapshot", "check", entry["id"])
        daemon.cli("storage", "limit", entry["id"], "32M")
        daemon.cli("snapshot", "destroy", entry["id"], "--force")
