# SPDX-License-Identifier: MIT
"""No memory: what serves a device neither needs any while it serves, nor waits for its own device to get some."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from tests.direct_io import read_at, write_at
from tests.filtered import filtered
from tests.io_threads import counted_calls, faults, missing_for_counted_calls
from tests.loop_devices import missing_for_loops, mounted, run
from tests.null_block import missing_for_null_blocks, null_block
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
DISK = 128
"""MiB of a disk."""

SMALL, WARM = 64, 8
"""MiB of a small disk, and of its beginning, where everything happens once before it counts."""

LIMIT = 240
"""Seconds in which everything must have ended: what stands still does so for ever."""

missing = missing_for_loops() or missing_for_null_blocks()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

# Takes memory until the machine has so little left that it must swap, keeps touching it, and then gives it back.
EATER = """
import sys, time
wanted, until = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
def free_swap():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("SwapFree"))
pieces, before = [], free_swap()
while before - free_swap() < wanted and time.monotonic() < until:
    pieces.append(bytearray(b"x" * 4096) * 256)
print(before - free_swap(), flush=True)
for piece in pieces:
    assert piece[::4096] == b"x" * 256
"""


@pytest.fixture
def disk() -> Iterator[str]:
    with null_block(DISK * MIB, block=4096) as path:
        _fill(path, DISK)
        yield path


@pytest.fixture
def storage() -> Iterator[str]:
    with null_block((2 * DISK + 32) * MIB, block=4096) as path:
        _fill(path, 2 * DISK + 32)
        yield path


def _fill(path: str, mib: int) -> None:
    """So that it needs no memory from then on."""
    run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", f"count={mib}", "oflag=direct", "status=none")


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    for start in range(0, DISK * MIB, MIB):
        digest.update(read_at(path, start, MIB))
    return digest.hexdigest()


@contextmanager
def _cgroup(limit: int) -> Iterator[Path]:
    """A control group whose processes may use so many bytes of memory, page cache included."""
    top = Path("/sys/fs/cgroup")
    if "memory" not in (top / "cgroup.controllers").read_text().split():
        pytest.skip("no memory controller in /sys/fs/cgroup")
    (top / "cgroup.subtree_control").write_text("+memory")
    group = top / f"blksnap-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.max").write_text(str(limit))
        (group / "memory.swap.max").write_text("0")
        yield group
    finally:
        wait_until("the control group is empty", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def _flood(directory: Path, group: Path) -> subprocess.Popen[bytes]:
    """Writes 64 MiB twice through the page cache, with the little memory that the group has."""
    write = f"dd if=/dev/zero of={directory}/flood bs=1M count=64 conv=fsync,notrunc status=none"
    return subprocess.Popen(["sh", "-c", f"echo $$ > {group}/cgroup.procs && {write} && {write}"])


def _eater() -> subprocess.Popen[bytes]:
    """Takes memory until 72 MiB of others have been swapped out; it is the first to be killed."""
    eater = subprocess.Popen([sys.executable, "-S", "-c", EATER, str(72 * MIB), "120"], stdout=subprocess.PIPE)
    Path(f"/proc/{eater.pid}/oom_score_adj").write_text("1000")
    return eater


def test_writes_and_swap_go_on_without_memory(client: Client, disk: str, storage: str, folder: Path) -> None:
    """A flood of dirty pages on a file system, and swap, both above the filter, with a snapshot held of each."""
    with ExitStack() as stack:
        swap_disk = stack.enter_context(null_block(DISK * MIB, block=4096))
        _fill(swap_disk, DISK)
        flooded = stack.enter_context(filtered(client, disk, "zero-copy", folder, queues=2))
        swap = stack.enter_context(filtered(client, swap_disk, "copy", folder, queues=1))
        files = stack.enter_context(
            mounted(flooded.path, folder / "files", mkfs=["-E", "nodiscard"], options="nodiscard")
        )
        run("mkswap", swap.path)
        snapshot = client.create_snapshot([flooded.path, swap.path], storage=[storage])
        images = [image.image for image in snapshot.images]
        before = [_sha256(image) for image in images]
        run("swapon", "--priority", "100", swap.path)
        stack.callback(run, "swapoff", swap.path)
        # Had the io process a page there it would wait for itself: nothing ends from then on.
        _take_what_is_not_locked()
        flood = _flood(files, stack.enter_context(_cgroup(32 * MIB)))
        eater = _eater()
        try:
            swapped = int(eater.communicate(timeout=LIMIT)[0])
            assert flood.wait(LIMIT) == 0
        finally:
            for process in (flood, eater):
                process.kill()
                process.wait()
        assert swapped > 48 * MIB
        assert eater.returncode == 0
        run("sync", "-f", str(files))
        assert client.check_snapshot(snapshot.id).trusted
        assert [_sha256(image) for image in images] == before


@contextmanager
def _two_disks() -> Iterator[tuple[str, str]]:
    """An origin of SMALL MiB, and a storage that has room for all of it."""
    with null_block(SMALL * MIB, block=4096) as disk, null_block(2 * SMALL * MIB, block=4096) as storage:
        _fill(disk, SMALL)
        yield disk, storage


def _first_overwrites(path: str, image: str, first: int, count: int) -> None:
    """Overwrites units that were never overwritten, one, two and 64 at a time, and reads them from the image."""
    for n in range(first, first + count):
        for place, length in ((0, 4096), (8192, 8192), (256 << 10, 256 << 10)):
            write_at(path, n * MIB + place, b"\xaa" * length)
            read_at(image, n * MIB + place, length)


def _take_what_is_not_locked() -> None:
    """Lets the kernel take back all memory that it may: of files, mapped or not; what is needed again has to fault."""
    reclaim = Path("/sys/fs/cgroup/memory.reclaim")
    if not reclaim.exists():
        pytest.skip("no memory.reclaim in /sys/fs/cgroup")
    with suppress(BlockingIOError):  # it could not take as much
        reclaim.write_text("1G")


def _all_was_preserved(client: Client, snapshot: forms.Snapshot) -> None:
    assert client.check_snapshot(snapshot.id).trusted
    assert client.show_storage(snapshot.id).used >= SMALL * (4096 + 8192 + (256 << 10))


@pytest.mark.quick
def test_queue_threads_do_not_fault(way: str, client: Client, daemon: OwnDaemon, folder: Path) -> None:
    with _two_disks() as (disk, storage), filtered(client, disk, way, folder) as device:
        snapshot = device.snapshot(storage)
        image = snapshot.images[0].image
        _first_overwrites(device.path, image, 0, WARM)
        io = daemon.pid("io")
        _take_what_is_not_locked()
        before = faults(io)
        assert len(before) >= 2
        _first_overwrites(device.path, image, WARM, SMALL - WARM)
        after = faults(io)
        assert after.keys() == before.keys()
        assert [after[tid].with_io for tid in before] == [before[tid].with_io for tid in before]
        # User-Mode Linux learns by a fault that a page is used, or written to, for the first time in a while.
        if os.environ.get("BLKSNAP_GUEST") != "uml":
            assert after == before
        _all_was_preserved(client, snapshot)


@pytest.mark.skipif(missing_for_counted_calls() is not None, reason=str(missing_for_counted_calls()))
def test_queue_threads_do_not_ask_for_memory(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        calls = stack.enter_context(counted_calls(folder))
        for name, value in calls.environment.items():
            monkeypatch.setenv(name, value)
        daemon = stack.enter_context(own_daemon())
        client = stack.enter_context(daemon.client())
        disk, storage = stack.enter_context(_two_disks())
        device = stack.enter_context(filtered(client, disk, way, folder))
        snapshot = device.snapshot(storage)
        image = snapshot.images[0].image
        _first_overwrites(device.path, image, 0, WARM)
        threads = faults(daemon.pid("io"))
        before = calls.of(threads)
        assert calls.all() > 1000
        _first_overwrites(device.path, image, WARM, SMALL - WARM)
        assert calls.of(threads) == before
        _all_was_preserved(client, snapshot)
