# SPDX-License-Identifier: MIT
"""A filtered device with the file system that our own programs, the log and swap lie on, and the death of each process.

The daemon starts from a copy of interpreter, libraries and package on a tmpfs. Then a file system with the same copy,
on the filtered device, is mounted over it: as in a machine whose root file system is on the filtered device, and whose
initramfs has started the daemon. Whatever a process of ours opens from then on has to be read through us.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.direct_io import read_at
from tests.loop_devices import missing_for_loops, run
from tests.null_block import missing_for_null_blocks, null_block
from tests.own_daemon import PATIENCE, OwnDaemon

MIB = 1 << 20
DISK = 512 * MIB
NOT_NEEDED = shutil.ignore_patterns(
    *("test", "tests", "idlelib", "lib2to3", "ensurepip", "config-*", "site-packages", "tkinter", "turtledemo"),
    *("mypy*", "*mypyc*", "pip*", "hypothesis*", "setuptools*", "_pytest", "wheel*", "ast_serialize*"),
)
TOGETHER = ("io", "control")

missing = missing_for_loops() or missing_for_null_blocks()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


class InstalledDaemon(OwnDaemon):
    """A daemon that runs from a copy of all its files in `place`."""

    def __init__(self, place: Path, runtime: Path) -> None:
        self.python = place / "bin/python3"
        own = {
            "BLKSNAP_UBLK_RUN": str(runtime),
            "BLKSNAP_UBLK_LIFEBOAT_AFTER": "0",
            "LD_LIBRARY_PATH": str(place / "lib"),
            "PYTHONHOME": str(place),
            "PYTHONPATH": f"{place / 'site'}:{place / 'src'}",
        }
        super().__init__(runtime, os.environ | own)

    def launch(self) -> None:
        """Returns when it serves."""
        command = [str(self.python), "-m", "blksnap_ublk.daemon.main"]
        subprocess.run(command, env=self.environment, check=True, cwd="/", timeout=PATIENCE)

    def installed_cli(self, *arguments: str) -> str:
        """What the command line, from the copy as well, prints. It must succeed."""
        command = [str(self.python), "-m", "blksnap_ublk.cli.main", *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd="/", timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}\n{self.log()}"
        return done.stdout.strip()


def _install(place: Path) -> None:
    """Everything that the daemon is made of, apart from the C library."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (place / "bin").mkdir(parents=True)
    (place / "lib").mkdir()
    shutil.copy(Path(sys.executable).resolve(), place / "bin/python3")
    shutil.copytree(sysconfig.get_path("stdlib"), place / "lib" / version, ignore=NOT_NEEDED, symlinks=True)
    for library in Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*"):
        shutil.copy(library, place / "lib", follow_symlinks=False)
    shutil.copytree(sysconfig.get_path("purelib"), place / "site", ignore=NOT_NEEDED, symlinks=True)
    package = Path(__file__).resolve().parents[2] / "src"
    shutil.copytree(package, place / "src", symlinks=True)


@pytest.fixture
def stack(folder: Path) -> Iterator[ExitStack]:
    """What it does happens before the folder is removed."""
    with ExitStack() as stack:
        yield stack


def _mount(stack: ExitStack, *arguments: str) -> None:
    run("mount", *arguments)
    stack.callback(subprocess.run, ["umount", "--lazy", arguments[-1]], check=False)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    for start in range(0, DISK, MIB):
        digest.update(read_at(path, start, MIB))
    return digest.hexdigest()


def _forget_pages() -> None:
    """Nothing of a file is in memory any more, but what somebody has locked there."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _mapped_from(pid: int, place: Path) -> str:
    """The file system, as major:minor, that the interpreter of a process was started from."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next(line.split()[3] for line in maps if line.endswith(str(place / "bin/python3")))


def _write_durably(path: Path, text: str) -> None:
    """In a process of its own: it may have to wait for a recovery."""
    script = "import os, sys; f = open(sys.argv[1], 'a'); f.write(sys.argv[2]); f.flush(); os.fsync(f.fileno())"
    subprocess.run([sys.executable, "-S", "-c", script, str(path), text], check=True, timeout=PATIENCE)


def _kill(daemon: InstalledDaemon, role: str) -> int:
    pid = daemon.pid(role)
    os.kill(pid, signal.SIGKILL)
    return pid


def _has_successor(daemon: InstalledDaemon, role: str, former: int) -> bool:
    try:
        return daemon.pid(role) != former
    except (KeyError, OSError, ValueError):
        return False


def test_each_process_may_die_where_its_own_files_lie(stack: ExitStack, folder: Path) -> None:
    disk = stack.enter_context(null_block(DISK, block=4096))
    storage = stack.enter_context(null_block(DISK, block=4096))
    place, runtime = folder / "own", folder / "run"
    _install(place)
    daemon = InstalledDaemon(place, runtime)
    daemon.launch()
    stack.callback(_end, daemon)
    device = daemon.installed_cli("attach", disk)
    _cover(stack, daemon, device, place)
    snapshot = daemon.installed_cli("snapshot", "create", device, "--storage", storage, "--no-freeze")
    image = daemon.installed_cli("snapshot", "show", snapshot, "--json")
    image = next(part for part in image.split('"') if part.startswith("/dev/ublkb") and part != device)
    before = _sha256(image)
    written = place / "written"
    on_device = os.stat(device).st_rdev
    expected = ""
    for n, role in enumerate(["io", "control", "keeper", "io", "control", "keeper", "io"]):
        _forget_pages()
        former = _kill(daemon, role)
        expected += f"{n} {role}\n"
        _write_durably(written, f"{n} {role}\n")
        _wait(daemon, f"another {role} process", partial(_has_successor, daemon, role, former))
        _forget_pages()
        assert written.read_text() == expected
        assert '"state":"live"' in daemon.installed_cli("list", "--json").replace(" ", "")
        daemon.installed_cli("snapshot", "check", snapshot)
        assert _sha256(image) == before
        _wait_for_spares(daemon)
    # The last ones were started from files on the filtered device.
    device_number = f"{os.major(on_device):02x}:{os.minor(on_device):02x}"
    assert {_mapped_from(daemon.pid(role), place) for role in ("io", "control", "keeper")} == {device_number}
    daemon.installed_cli("snapshot", "destroy", snapshot)


def _cover(stack: ExitStack, daemon: InstalledDaemon, device: str, place: Path) -> None:
    """Mounts a file system on the filtered device, with the same files, over them; log and swap lie on it, too."""
    run("mkfs.ext4", "-q", "-E", "nodiscard", device)
    inner = place.with_name("inner")
    inner.mkdir()
    run("mount", "-o", "nodiscard", device, str(inner))
    try:
        run("cp", "-a", f"{place}/.", str(inner))
        (inner / "log").write_text("")
        swap = inner / "swap"
        run("dd", "if=/dev/zero", f"of={swap}", "bs=1M", "count=32", "status=none")
        swap.chmod(0o600)
        run("mkswap", str(swap))
        _mount(stack, "--bind", str(inner), str(place))
    finally:
        run("umount", str(inner))
    _mount(stack, "--bind", str(place / "log"), str(daemon.runtime / "log"))
    run("swapon", str(place / "swap"))
    stack.callback(run, "swapoff", str(place / "swap"))


def _wait(daemon: InstalledDaemon, what: str, condition: Callable[[], bool]) -> None:
    """As `wait_until`, and longer; tells the log when it was in vain."""
    end = time.monotonic() + 2 * PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}\n{daemon.log()}"
        time.sleep(0.1)


def _wait_for_spares(daemon: InstalledDaemon) -> None:
    """Until both stand ready again: a death of both in the same moment is another story."""

    def ready() -> bool:
        try:
            return all(daemon.pid(f"{role}-spare") > 0 for role in TOGETHER)
        except (KeyError, OSError, ValueError):
            return False

    _wait(daemon, "spare processes", ready)
    time.sleep(0.5)


def _end(daemon: InstalledDaemon) -> None:
    """After the file system is gone."""
    with daemon.client() as client:
        for held in client.list_snapshots():
            client.destroy_snapshots([held.id], force=True)
        for device in client.list_devices():
            client.detach(device.device, force=True)
    daemon.end()
