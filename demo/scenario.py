# SPDX-License-Identifier: MIT
"""Shows and checks, on real ublk devices, what blksnap-ublk is for. Needs root, ublk, fio, e2fsprogs.

    python demo/scenario.py [--size MIB]

Ends with 0 when everything is as promised, otherwise with 1 and one line that says what is not.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from blksnap_ublk import connect
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.keeper.processes import read_processes
from blksnap_ublk.keeper.runtime import RuntimePaths
from demo import steps
from demo.disks import bench, memory_available
from demo.load import Load
from demo.narration import NotAsPromised, check, step, tell

DEFAULT_MIB = 1024
EMULATED_MIB = 128
LEAST_MIB = 64


def run(size: int) -> None:
    """The whole scenario on disks of `size` bytes. Raises NotAsPromised; cleans up on every path."""
    disks_before = _ublk_devices()
    with ExitStack() as stack:
        runtime = stack.enter_context(_daemon_of_its_own())
        made = stack.enter_context(bench(size))
        stack.callback(_end_daemon, runtime)
        stack.callback(steps.unmount_all, made)
        found = steps.Found()
        with step(1, "Two disks; ext4 on the filtered device of the first"):
            steps.make_file_system(made, found)
        with Load(made.mount_point, size // 32) as load:
            with step(2, "A snapshot while fio, file operations and fstrim run"):
                first = steps.first_snapshot(made, found)
            with step(3, "Heavy writes go on; the image does not change"):
                steps.image_stays(made, first, load)
            with step(4, "Incremental copy: what changed since the first snapshot"):
                steps.incremental_copy(made, found, first, load)
            with step(5, "A storage that is too small"):
                steps.overflow(made, load)
        with step(6, "Detach; the origin has everything"):
            steps.leave(made, found)
            processes = _processes(runtime)
            _end_daemon(runtime)
            alive = _left_alive(processes)
            check("no process of ours is left", not alive, alive)
            check("no ublk device is left", _ublk_devices() == disks_before, _ublk_devices())
    left = [path for path in (made.directory, runtime) if path.exists()]
    check("no file and no loop device is left", not left and not _loops_in(made.directory), left)


class _daemon_of_its_own:  # noqa: N801 - a context manager used like a function
    """A runtime directory for the demo, so that a daemon which runs already is left alone."""

    def __enter__(self) -> Path:
        self._directory = tempfile.TemporaryDirectory(prefix="blksnap-demo-run-")
        own = {"BLKSNAP_UBLK_RUN": self._directory.name, "BLKSNAP_UBLK_STATE": f"{self._directory.name}/saved"}
        self._before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        return Path(self._directory.name)

    def __exit__(self, *exception: object) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        self._directory.cleanup()


def _end_daemon(runtime: Path) -> None:
    """Ends the daemon if it runs; on the way out of a failure with everything that it still serves."""
    if not (runtime / "daemon.lock").exists():
        return
    log = runtime / "log"
    with connect(start=False) as client:
        for snapshot in client.list_snapshots():
            client.destroy_snapshots([snapshot.id], force=True)
        for device in client.list_devices():
            client.detach(device.name, force=True)
        client.stop()
    if log.exists() and os.environ.get("BLKSNAP_DEMO_LOG"):
        print(log.read_text(), file=sys.stderr)


def _processes(runtime: Path) -> list[int]:
    return [member.pid for member in read_processes(RuntimePaths(runtime).processes).processes.values()]


def _left_alive(processes: list[int]) -> list[int]:
    """Those that have not ended some seconds after they closed their sockets."""
    end = time.monotonic() + 30
    while alive := [pid for pid in processes if _is_alive(pid)]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return alive


def _is_alive(pid: int) -> bool:
    """Not for one that has ended and that its parent has not asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _ublk_devices() -> list[str]:
    return sorted(path.name for path in Path("/dev").glob("ublk[bc]*"))


def _loops_in(directory: Path) -> list[str]:
    backing = Path("/sys/block").glob("loop*/loop/backing_file")
    return [path.parts[3] for path in backing if path.read_text().startswith(str(directory))]


def _default_mib() -> tuple[int, str]:
    """MiB of each disk, and why it is less than usual. In a guest of ours the disks lie in memory."""
    guest = os.environ.get("BLKSNAP_GUEST")
    if guest == "tcg":  # 10 to 30 times slower
        return EMULATED_MIB, "the processor is emulated here"
    if guest:
        room = memory_available() // 6 >> 26 << 6
        return max(LEAST_MIB, min(DEFAULT_MIB, room)), "this guest has little memory"
    return DEFAULT_MIB, ""


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Shows blksnap-ublk at work on two disks of its own making.")
    default, reason = _default_mib()
    parser.add_argument("--size", type=int, default=default, metavar="MIB", help=f"size of each disk ({default})")
    size = parser.parse_args().size
    if size < LEAST_MIB:
        parser.error(f"--size: at least {LEAST_MIB} MiB")
    if os.geteuid() != 0:
        print("scenario: needs root: use sudo", file=sys.stderr)
        return 1
    print(f"blksnap-ublk on Linux {platform.release()}")
    if size == default < DEFAULT_MIB:
        tell(f"{reason}: disks of {size} MiB instead of {DEFAULT_MIB}")
    try:
        run(size << 20)
    except (NotAsPromised, BlksnapError, OSError) as error:
        print(f"\nscenario: {error}", file=sys.stderr)
        return 1
    tell("")
    print("Everything is as promised.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
