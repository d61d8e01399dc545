# SPDX-License-Identifier: MIT
"""File systems above filtered devices are frozen for the instant, and none stays frozen whoever is killed when."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.host import blockdev
from tests.device_mapper import mapped_table, missing_for_targets
from tests.freezing import FREEZER, WATCHDOG, assert_thawed, helpers, kill, wait_until_gone
from tests.loop_devices import loop_device, mapped, mounted, partitioned, run
from tests.own_daemon import OwnDaemon, wait_until

MIB = 1 << 20
SIZES = {"ext4": 32 * MIB, "xfs": 320 * MIB}
ROUNDS = int(os.environ.get("KILL_ROUNDS", "2"))
AS_IT_IS = {"ext4": "ro,noload", "xfs": "ro,nouuid,norecovery"}
"""Mount options with which nothing is brought in order: only what was frozen looks right then."""
no_linear = missing_for_targets("linear")
HOLDER = """
import os, sys
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot import freeze
freeze.FREEZE_LIMIT = float(sys.argv[2])
with freeze.Freezer(freeze.mounted_on([DeviceNumber.of(os.stat(sys.argv[1]).st_dev)])) as freezer:
    print("started", flush=True)
    sys.stdin.readline()
    freezer.freeze()
    freezer.thaw()
"""


@contextmanager
def attached(client: Client, origin: str) -> Iterator[str]:
    """Its filtered device; at the end the snapshots of it are destroyed."""
    device = client.attach(origin).device
    clean = False
    try:
        yield device
        clean = True
    finally:
        for snapshot in client.list_snapshots():
            client.destroy_snapshots([snapshot.id], force=not clean)
        client.detach(device, force=not clean)


def frozen_snapshot(client: Client, folder: Path, *devices: str) -> forms.Snapshot:
    """A snapshot whose file systems must all be frozen."""
    size = sum(blockdev.describe(device).size for device in devices) + MIB
    storage = folder / "storage"
    storage.mkdir(exist_ok=True)
    snapshot = client.create_snapshot(devices, storage=[str(storage)], limit=size, freeze=forms.Freeze.REQUIRE)
    assert snapshot.frozen
    return snapshot


def image_of(snapshot: forms.Snapshot, device: str) -> str:
    return next(image.image for image in snapshot.images if image.device == device)


def write_unsynced(top: Path) -> bytes:
    """A file that stays in the page cache unless somebody writes it back; its content."""
    content = os.urandom(100_000)
    (top / "unsynced").write_bytes(content)
    return content


@contextmanager
def mounted_as_it_is(device: str, point: Path, kind: str = "ext4") -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    run("mount", "-t", kind, "-o", AS_IT_IS[kind], device, str(point))
    try:
        yield point
    finally:
        run("umount", str(point))


@pytest.mark.quick
def test_ext4_and_xfs_on_two_devices(client: Client, folder: Path) -> None:
    if not shutil.which("mkfs.xfs"):
        pytest.skip("no mkfs.xfs")
    with (
        loop_device(folder / "one", SIZES["ext4"]) as one,
        loop_device(folder / "two", SIZES["xfs"]) as two,
        attached(client, one) as first,
        attached(client, two) as second,
        mounted(first, folder / "first") as ext4,
        mounted(second, folder / "second", "xfs") as xfs,
    ):
        content = {first: write_unsynced(ext4), second: write_unsynced(xfs)}
        snapshot = frozen_snapshot(client, folder, first, second)
        for device, kind, top in ((first, "ext4", ext4), (second, "xfs", xfs)):
            assert_thawed(top)
            with mounted_as_it_is(image_of(snapshot, device), folder / "image", kind) as image:
                assert (image / "unsynced").read_bytes() == content[device]
        client.destroy_snapshots([snapshot.id])


def test_a_partition(client: Client, folder: Path) -> None:
    image = partitioned(folder / "origin", SIZES["ext4"], [(2048, 20480), (24576, 32768)])
    with loop_device(image) as origin, attached(client, origin) as device:
        if not Path(device + "p1").exists():
            pytest.skip("this kernel reads no partition tables")
        with mounted(device + "p1", folder / "first") as first, mounted(device + "p2", folder / "second") as second:
            content = write_unsynced(second)
            snapshot = frozen_snapshot(client, folder, device)
            assert_thawed(first)
            assert_thawed(second)
            start = ["-o", str(24576 * 512), "--sizelimit", str(32768 * 512), "--read-only"]
            with (
                loop_device(Path(image_of(snapshot, device)), None, start) as part,
                mounted_as_it_is(part, folder / "image") as top,
            ):
                assert (top / "unsynced").read_bytes() == content
            client.destroy_snapshots([snapshot.id])


@pytest.mark.skipif(no_linear is not None, reason=str(no_linear))
def test_device_mapper_above(client: Client, folder: Path) -> None:
    sectors = SIZES["ext4"] // 512 - 2048
    with (
        loop_device(folder / "origin", SIZES["ext4"]) as origin,
        attached(client, origin) as device,
        mapped(f"bsu-freeze-{os.getpid()}", f"0 {sectors} linear {device} 2048") as above,
        mounted(above, folder / "data") as top,
    ):
        content = write_unsynced(top)
        snapshot = frozen_snapshot(client, folder, device)
        assert_thawed(top)
        options = ["-o", str(2048 * 512), "--read-only"]
        with (
            loop_device(Path(image_of(snapshot, device)), None, options) as part,
            mounted_as_it_is(part, folder / "image") as image,
        ):
            assert (image / "unsynced").read_bytes() == content
        client.destroy_snapshots([snapshot.id])


def test_a_file_system_in_a_file_of_another(client: Client, folder: Path) -> None:
    """Mounted first or last: in the wrong order freezing would wait for itself."""
    with (
        loop_device(folder / "origin", 2 * SIZES["ext4"]) as origin,
        attached(client, origin) as device,
        mounted(device, folder / "outer") as outer,
        loop_device(outer / "inner.img", SIZES["ext4"]) as loop,
        mounted(loop, folder / "inner") as inner,
    ):
        contents = []
        for _ in range(3):
            contents.append(write_unsynced(inner))
            snapshot = frozen_snapshot(client, folder, device)
            assert_thawed(inner)
            assert_thawed(outer)
            with (
                mounted_as_it_is(image_of(snapshot, device), folder / "image") as image,
                loop_device(image / "inner.img", None, ["--read-only"]) as copy,
                mounted_as_it_is(copy, folder / "inner-image") as top,
            ):
                assert (top / "unsynced").read_bytes() == contents[-1]
            client.destroy_snapshots([snapshot.id])


def test_what_cannot_be_frozen_is_said_or_refused(
    client: Client, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mount that nobody can reach."""
    with (
        loop_device(folder / "origin", SIZES["ext4"]) as origin,
        attached(client, origin) as device,
        mounted(device, folder / "data") as top,
    ):
        run("mount", "-t", "tmpfs", "none", str(top))
        try:
            with pytest.raises(BlksnapError, match=r"hidden beneath another.*; .*--require-freeze"):
                frozen_snapshot(client, folder, device)
            storage, limit = [str(folder)], SIZES["ext4"] + MIB
            snapshot = client.create_snapshot([device], storage=storage, limit=limit)
            assert not snapshot.frozen
            assert "hidden beneath another" in caplog.text
            caplog.clear()
            client.destroy_snapshots([snapshot.id])
            snapshot = client.create_snapshot([device], storage=storage, limit=limit, freeze=forms.Freeze.NO)
            assert not snapshot.frozen
            assert "hidden" not in caplog.text
            client.destroy_snapshots([snapshot.id])
        finally:
            run("umount", str(top))


@pytest.mark.parametrize("victims", ["control", FREEZER, WATCHDOG, f"control {FREEZER}", f"control {WATCHDOG}"])
def test_nothing_stays_frozen_whoever_is_killed(daemon: OwnDaemon, folder: Path, victims: str) -> None:
    """At a drawn moment of the life of the helpers; KILL_ROUNDS says how often."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with (
        loop_device(folder / "one", SIZES["ext4"]) as one,
        loop_device(folder / "two", SIZES["ext4"]) as two,
        attached_to(daemon, one) as first,
        attached_to(daemon, two) as second,
        mounted(first, folder / "first") as a,
        mounted(second, folder / "second") as b,
    ):
        with daemon.client() as client:
            frozen_snapshot(client, folder, first, second)
        for _ in range(ROUNDS):
            kill_while_taking(daemon, folder, [first, second], victims.split(), chance)
            assert_thawed(a)
            assert_thawed(b)
            wait_until_gone(a)
            wait_until_gone(b)
            wait_until("control answers", lambda: answers(daemon))


@contextmanager
def attached_to(daemon: OwnDaemon, origin: str) -> Iterator[str]:
    """The same by connections of its own: the control process does not live as long."""
    with daemon.client() as client:
        device = client.attach(origin).device
    try:
        yield device
    finally:
        with daemon.client() as client:
            for snapshot in client.list_snapshots():
                client.destroy_snapshots([snapshot.id], force=True)
            client.detach(device, force=True)


def kill_while_taking(
    daemon: OwnDaemon, folder: Path, devices: list[str], victims: list[str], chance: random.Random
) -> None:
    control = daemon.pid("control")

    def take() -> None:
        with suppress(BlksnapError, OSError), daemon.client() as client:
            client.create_snapshot(devices, storage=[str(folder / "storage")], limit=2 * SIZES["ext4"] + MIB)

    taking = threading.Thread(target=take)
    taking.start()
    first = folder / "first"
    while taking.is_alive() and not helpers(first, FREEZER, WATCHDOG, "python", "python3"):
        time.sleep(0.002)
    time.sleep(chance.random() * 0.15)
    found = {name: helpers(first, name) for name in (FREEZER, WATCHDOG)}
    kill(*(pid for victim in victims for pid in ([control] if victim == "control" else found[victim])))
    print(f"killed {victims}, while there were {found}; taking went on: {taking.is_alive()}")
    taking.join()
    if "control" in victims:
        wait_until("another control process", lambda: daemon.replaced("control", control))


def answers(daemon: OwnDaemon) -> bool:
    with suppress(BlksnapError), daemon.client() as client:
        client.list_devices()
        return True
    return False


@pytest.mark.skipif(no_linear is not None, reason=str(no_linear))
@pytest.mark.parametrize("victims", ["", "control", FREEZER, WATCHDOG, f"control {FREEZER}", f"control {WATCHDOG}"])
def test_a_freeze_that_comes_through_late_is_thawed(folder: Path, victims: str) -> None:
    """FIFREEZE waits for a disk that does not answer, somebody is killed or the limit passes, then the disk answers."""
    with (
        loop_device(folder / "disk", SIZES["ext4"]) as disk,
        mapped_table(f"bsu-late-{os.getpid()}", f"0 {SIZES['ext4'] // 512} linear {disk} 0") as table,
        mounted(table.path, folder / "data", options="barrier=0") as top,
    ):
        run("sync", "-f", str(top))
        with holder(top, limit=10 if victims else 0.5) as process:
            (freezer,), (watchdog,) = helpers(top, FREEZER), helpers(top, WATCHDOG)
            table.suspend()
            try:
                assert process.stdin is not None
                process.stdin.write(b"\n")
                process.stdin.flush()
                wait_until("it waits for the disk", lambda: waits_in_kernel(freezer))
                pids = {"control": process.pid, FREEZER: freezer, WATCHDOG: watchdog}
                kill(*(pids[victim] for victim in victims.split()))
                time.sleep(2)  # beyond the limit of the round without victims, and the grace of the watchdog
                assert Path(f"/proc/{freezer}").exists()
            finally:
                table.resume()
        wait_until_gone(top)
        assert_thawed(top)


@contextmanager
def holder(top: Path, limit: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has its helpers, and freezes and thaws when it gets a line. It may end as it likes."""
    command = [sys.executable, "-c", HOLDER, str(top), str(limit)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        yield process


def waits_in_kernel(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
