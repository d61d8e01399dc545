# SPDX-License-Identifier: MIT
"""The three processes on a real ublk device: what happens to I/O when one dies, and what is left at the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.processes import read_processes
from blksnap_ublk.keeper.runtime import RuntimePaths
from tests.loop_devices import loop_device, mapped, run

DISK = 64 << 20
PATIENCE = 120
UBLK = Path("/sys/class/ublk-char")
PF_MEMALLOC_NOIO = 0x00080000


class Daemon:
    """A daemon of the test's own, with its log and its processes."""

    def __init__(self, folder: Path) -> None:
        self.paths = RuntimePaths(folder / "run")
        self.environment = os.environ | {
            "BLKSNAP_UBLK_RUN": str(self.paths.root),
            "BLKSNAP_UBLK_STATE": str(folder / "saved"),
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "blksnap_ublk.daemon.main"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr

    def cli(self, *arguments: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "blksnap_ublk.cli.main", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == status, f"{arguments}: {done.stderr}{self.log()}"
        return (done.stdout if status == 0 else done.stderr).strip()

    def json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "--json"))

    def pid(self, role: str) -> int:
        """The process that is the keeper, io or control now."""
        return read_processes(self.paths.processes).processes[role].pid

    def kill(self, role: str) -> None:
        os.kill(self.pid(role), signal.SIGKILL)

    def log(self) -> str:
        return self.paths.log.read_text() if self.paths.log.exists() else ""

    def end(self) -> None:
        """SIGTERM to the keeper, and its end."""
        keeper = self.pid("keeper")
        os.kill(keeper, signal.SIGTERM)
        wait_for(lambda: not alive(keeper), f"the keeper to end\n{self.log()}")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def ublk_devices() -> list[str]:
    return sorted(path.name for path in UBLK.iterdir()) if UBLK.exists() else []


@contextlib.contextmanager
def fio(device: str, seconds: int = 6) -> Iterator[None]:
    """Random writes with verification on `device` while the block runs, ended without an error."""
    with tempfile.TemporaryFile("w+") as output:
        job = subprocess.Popen(
            [
                *("fio", "--name=v", f"--filename={device}", "--rw=randrw", "--bs=4k-64k", "--bsrange=4k-64k"),
                *("--direct=1", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1"),
                *(
                    "--verify_backlog=64",
                    "--verify_state_save=0",
                    "--time_based",
                    f"--runtime={seconds}",
                    "--size=100%",
                    "--minimal",
                ),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
            assert job.wait(PATIENCE) == 0, output.seek(0) or output.read()
        finally:
            if job.poll() is None:
                job.kill()
                job.wait(PATIENCE)


@pytest.fixture
def folder() -> Iterator[Path]:
    base = "/tmp/guest" if Path("/tmp/guest").is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as path:
        yield Path(path)


@pytest.fixture
def daemon(folder: Path) -> Iterator[Daemon]:
    before = ublk_devices()
    daemon = Daemon(folder)
    daemon.start()
    try:
        yield daemon
    finally:
        if daemon.paths.processes.exists() and read_processes(daemon.paths.processes).living("keeper"):
            daemon.end()
    assert ublk_devices() == before, daemon.log()


@pytest.fixture
def origin(folder: Path) -> Iterator[str]:
    with loop_device(folder / "disk", DISK) as path:
        yield path


def test_a_clean_end_leaves_nothing(daemon: Daemon, origin: str, folder: Path) -> None:
    device = daemon.cli("attach", origin)
    daemon.cli("snapshot", "create", device, "--storage", str(folder), "--no-freeze")
    daemon.end()
    assert [path.name for path in daemon.paths.root.iterdir()] == ["log"]
    assert str(daemon.paths.state) not in Path("/proc/self/mountinfo").read_text()
    # The origin is free: nobody has it exclusively.
    os.close(os.open(origin, os.O_RDWR | os.O_EXCL))


def test_a_command_starts_the_daemon(folder: Path, origin: str) -> None:
    daemon = Daemon(folder)
    device = daemon.cli("attach", origin)
    assert Path(f"/proc/{daemon.pid('keeper')}/cwd").readlink() == Path("/")
    daemon.cli("detach", device)
    daemon.end()


def test_control_dies_under_load_and_nobody_notices(daemon: Daemon, origin: str, folder: Path) -> None:
    device = daemon.cli("attach", origin)
    io = daemon.pid("io")
    with fio(device, seconds=10):
        snapshot = daemon.cli("snapshot", "create", device, "--storage", str(folder), "--no-freeze")
        image = daemon.json("snapshot", "show", snapshot)["images"][0]["image"]
        seen = run("sha256sum", image)
        for _ in range(3):
            control = daemon.pid("control")
            daemon.kill("control")
            assert [each["state"] for each in daemon.json("list")["devices"]] == ["live"]
            assert daemon.pid("control") != control
        assert run("sha256sum", image) == seen
    daemon.cli("snapshot", "check", snapshot)
    assert daemon.pid("io") == io
    assert run("sha256sum", image) == seen
    daemon.cli("snapshot", "destroy", snapshot)
    daemon.cli("detach", device)


def test_the_keeper_dies_under_load_and_another_one_adopts_the_others(daemon: Daemon, origin: str) -> None:
    device = daemon.cli("attach", origin)
    former = {role: daemon.pid(role) for role in ("keeper", "io", "control")}
    with fio(device):
        daemon.kill("keeper")
        assert [each["device"] for each in daemon.json("list")["devices"]] == [device]
        wait_for(lambda: daemon.pid("keeper") != former["keeper"], "another keeper")
        assert (daemon.pid("io"), daemon.pid("control")) == (former["io"], former["control"])
        # It holds the origin: io may die now.
        with KeeperClient(daemon.paths.keeper_socket) as keeper:
            wait_for(lambda: any(name.startswith("origin:") for name in keeper.names()), "the origin to be held")
        daemon.kill("io")
    daemon.cli("detach", device)
    daemon.end()
    assert [path.name for path in daemon.paths.root.iterdir()] == ["log"]


def test_io_dies_under_load_and_the_device_comes_back(daemon: Daemon, origin: str) -> None:
    device = daemon.cli("attach", origin)
    with fio(device, seconds=8):
        first = daemon.pid("io")
        daemon.kill("io")
        wait_for(lambda: daemon.pid("io") != first, "another io process")
    assert [each["state"] for each in daemon.json("list")["devices"]] == ["live"]
    daemon.cli("detach", device)


def test_a_device_in_use_is_kept_and_found_again(daemon: Daemon, origin: str, folder: Path) -> None:
    device = daemon.cli("attach", origin)
    run("mkfs.ext4", "-q", device)
    mount = folder / "mount"
    mount.mkdir()
    run("mount", device, str(mount))
    try:
        (mount / "before").write_text("written before")
        os.sync()
        daemon.end()
        log = daemon.log()
        assert "kept for recovery" in log
        assert str(daemon.paths.state) in Path("/proc/self/mountinfo").read_text()
        daemon.start()
        wait_for(lambda: [each["state"] for each in daemon.json("list")["devices"]] == ["live"], "the recovery")
        (mount / "after").write_text("written after")
        os.sync()
        assert (mount / "before").read_text() == "written before"
    finally:
        run("umount", str(mount))
    daemon.cli("detach", device)
    with open(origin, "rb") as file:
        assert b"written after" in file.read()


def test_trims_swallowed_under_a_snapshot_reach_the_origin_after_it(daemon: Daemon, origin: str, folder: Path) -> None:
    device = daemon.cli("attach", origin)
    if not int(Path(f"/sys/block/{Path(device).name}/queue/discard_max_bytes").read_text()):
        pytest.skip("no discard is offered on this kernel")
    run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=16", "oflag=direct", "status=none")
    disk = folder / "disk"
    full = disk.stat().st_blocks
    snapshot = daemon.cli("snapshot", "create", device, "--storage", str(folder), "--no-freeze")
    image = daemon.json("snapshot", "show", snapshot)["images"][0]["image"]
    seen = run("sha256sum", image)
    run("blkdiscard", "--length", str(16 << 20), device)
    assert disk.stat().st_blocks == full
    assert run("sha256sum", image) == seen
    daemon.cli("snapshot", "destroy", snapshot)
    wait_for(lambda: disk.stat().st_blocks <= full - (15 << 20) // 512, "the trims")
    daemon.cli("detach", device)


def test_how_the_io_process_runs(daemon: Daemon, origin: str, folder: Path) -> None:
    device = daemon.cli("attach", origin)
    daemon.cli("snapshot", "create", device, "--storage", str(folder), "--no-freeze")
    process = Path(f"/proc/{daemon.pid('io')}")
    threads = [stat.read_text().rpartition(")")[2].split() for stat in process.glob("task/*/stat")]
    assert len(threads) >= 3
    assert all(int(fields[6]) & PF_MEMALLOC_NOIO for fields in threads)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    assert int(status["VmLck"].split()[0]) > 0
    assert int(status["VmSwap"].split()[0]) == 0
    assert (process / "oom_score_adj").read_text().strip() == "-1000"
    # It has the locked file for its storage rings; that the rings hold it is not seen here.
    locks = (process / "fdinfo").glob("*")
    assert any("flock" in info.read_text().lower() for info in locks)


def test_a_signal_to_all_processes_is_a_clean_end(daemon: Daemon, origin: str) -> None:
    daemon.cli("attach", origin)
    keeper = daemon.pid("keeper")
    for role in ("io", "keeper", "control"):
        os.kill(daemon.pid(role), signal.SIGTERM)
    wait_for(lambda: not alive(keeper), f"the keeper to end\n{daemon.log()}")
    assert [path.name for path in daemon.paths.root.iterdir()] == ["log"]


def test_a_take_whose_writes_do_not_end_changes_nothing(daemon: Daemon, origin: str, folder: Path) -> None:
    sectors = DISK // 512
    with mapped("blksnap-late", f"0 {sectors} linear {origin} 0") as path:
        device = daemon.cli("attach", path)
        run("dmsetup", "suspend", "--noflush", "--nolockfs", "blksnap-late")
        writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={device}", "bs=4k", "count=1", "oflag=direct"])
        try:
            create = ("snapshot", "create", device, "--storage", str(folder), "--no-freeze")
            queues = Path(f"/sys/block/{Path(device).name}/inflight")
            wait_for(lambda: queues.read_text().split()[1] != "0", "the write to be in flight")
            assert "did not come to rest within 2 s" in daemon.cli(*create, status=4)
            assert daemon.json("snapshot", "list") == {"snapshots": []}
        finally:
            run("dmsetup", "resume", "blksnap-late")
            assert writer.wait(PATIENCE) == 0
        daemon.cli("snapshot", "destroy", daemon.cli(*create))
        daemon.cli("detach", device)
