# SPDX-License-Identifier: MIT
"""The control process killed before a step of an operation: afterwards nothing is left over, lost, frozen or locked.

The step is drawn; `ALL_STEPS=N` in the environment goes through all of them from the Nth on.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.keeper.client import KeeperClient
from tests.direct_io import read_at, write_at
from tests.loop_devices import loop_device, run
from tests.own_daemon import OwnDaemon, own_daemon, state_kinds, ublk_nodes, wait_until

SIZE = 32 << 20
STORAGE = 4 << 20
ALL = "ALL_STEPS" in os.environ
ROUNDS = 1 if ALL else 3
MOST_STEPS = 48
PROGRAM = Path(__file__).parents[1] / "killed_control.py"

drawn = settings(
    max_examples=ROUNDS,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon([str(PROGRAM)]) as daemon:
        yield daemon


def killed(daemon: OwnDaemon, step: int, operation: Callable[[Client], object]) -> bool:
    """Does something, the control process dies before that step of it, and the next one answers.

    False when it has fewer steps, and was done.
    """
    order = daemon.runtime / "kill-before"
    control = daemon.pid("control")
    with daemon.client() as client:
        order.write_text(str(step))
        try:
            with suppress(BlksnapError):
                operation(client)
        finally:
            died = not order.exists()
            order.unlink(missing_ok=True)
    if died:
        wait_until("another control process", lambda: daemon.replaced("control", control))
        wait_until("it answers", lambda: answers(daemon))
    return died


def answers(daemon: OwnDaemon) -> bool:
    with suppress(BlksnapError), daemon.client() as client:
        client.list_devices()
        return True
    return False


def each_step(step: int, of: Callable[[int], bool]) -> None:
    """The drawn step, or all of them."""
    if not ALL:
        of(step)
        return
    for every in range(int(os.environ["ALL_STEPS"]), 1000):
        print(f"before step {every}", flush=True)
        if not of(every):
            return


def expect_only(daemon: OwnDaemon, devices: int, snapshots: int) -> None:
    """Nothing exists but what so many devices and snapshots have, as soon as what is left was given back."""
    expected = sorted(["device"] * devices + ["image", "records", "storage"] * snapshots)
    wait_until(f"there is {expected or 'nothing'}", lambda: state_kinds(daemon) == expected)
    assert len(ublk_nodes()) == 2 * (devices + snapshots), daemon.log()
    assert len(list((daemon.runtime / "state").glob("buffers-*"))) == devices, daemon.log()
    held = sorted(["origin"] * devices + ["storage"] * snapshots)
    with KeeperClient(daemon.runtime / "keeper.sock") as keeper:
        wait_until(
            f"the keeper holds {held or 'nothing'}",
            lambda: sorted(name.partition(":")[0] for name in keeper.names()) == held,
        )


@drawn
@given(step=st.integers(1, MOST_STEPS))
def test_attach(daemon: OwnDaemon, folder: Path, step: int) -> None:
    with loop_device(folder / "origin", SIZE) as origin:

        def of(step: int) -> bool:
            died = killed(daemon, step, lambda client: client.attach(origin, name="data"))
            with daemon.client() as client:
                devices = client.list_devices()
                expect_only(daemon, len(devices), 0)
                if not devices:
                    os.close(os.open(origin, os.O_RDWR | os.O_EXCL))
                    client.attach(origin, name="data")
                client.detach("data")
                expect_only(daemon, 0, 0)
            os.close(os.open(origin, os.O_RDWR | os.O_EXCL))
            return died

        each_step(step, of)


@drawn
@given(step=st.integers(1, MOST_STEPS))
def test_detach(daemon: OwnDaemon, folder: Path, step: int) -> None:
    with loop_device(folder / "origin", SIZE) as origin:

        def of(step: int) -> bool:
            with daemon.client() as client:
                device = client.attach(origin, name="data").device
            data = os.urandom(4096)
            write_at(device, 0, data)
            died = killed(daemon, step, lambda client: client.detach("data"))
            with daemon.client() as client:
                devices = client.list_devices()
                expect_only(daemon, len(devices), 0)
                for each in devices:
                    client.detach(each.device)
            expect_only(daemon, 0, 0)
            descriptor = os.open(origin, os.O_RDWR | os.O_EXCL)
            assert os.pread(descriptor, 4096, 0) == data
            os.close(descriptor)
            return died

        each_step(step, of)


@drawn
@given(step=st.integers(1, MOST_STEPS))
def test_create_and_destroy(daemon: OwnDaemon, folder: Path, step: int) -> None:
    """Of a mounted device, with a storage file that is made longer for it; what is marked stays marked."""
    storage, mount = folder / "storage", folder / "mount"
    mount.mkdir(exist_ok=True)
    with loop_device(folder / "origin", SIZE) as origin:
        with daemon.client() as client:
            device = client.attach(origin, name="data").device
        try:
            run("mkfs.ext4", "-q", device)
            run("mount", device, str(mount))
            each_step(step, lambda step: create_and_destroy(daemon, step, storage, mount))
        finally:
            subprocess.run(["umount", str(mount)], check=False)
            with daemon.client() as client:
                client.detach("data", force=True)


def create_and_destroy(daemon: OwnDaemon, step: int, storage: Path, mount: Path) -> bool:
    storage.write_bytes(bytes(STORAGE))

    def create(client: Client) -> str:
        return client.create_snapshot(["data"], storage=[str(storage)], limit=2 * STORAGE).id

    def operation(client: Client) -> None:
        client.destroy_snapshots([create(client)])

    with daemon.client() as client:
        client.destroy_snapshots([create(client)])
        before = client.describe_changes("data").change_number
    write(mount / "first")
    died = killed(daemon, step, operation)
    write(mount / "second")
    with daemon.client() as client:
        snapshots = client.list_snapshots()
        expect_only(daemon, 1, len(snapshots))
        for snapshot in snapshots:
            assert client.check_snapshot(snapshot.id).trusted
            client.destroy_snapshots([snapshot.id])
        assert storage.stat().st_size == STORAGE
        expect_only(daemon, 1, 0)
        taken = client.describe_changes("data").change_number
        assert taken in (before, before + 1)
        last = create(client)
        (image,) = client.show_snapshot(last).images
        assert image.change_number == taken + 1
        generation = image.cursor.partition(":")[0]
        changes = client.changes("data", since=f"{generation}:{before}")
        assert not changes.all
        assert_marked(changes.ranges.tolist(), mount)
        client.destroy_snapshots([last])
    return died


@drawn
@given(step=st.integers(1, 3 * MOST_STEPS))
def test_sets_that_share_a_storage(daemon: OwnDaemon, folder: Path, step: int) -> None:
    """A snapshot of two devices, others that join its storage, and their ends, also before that of the older one.

    Another one stays and is right.
    """
    storage = folder / "storage"
    with loop_device(folder / "one", SIZE) as one, loop_device(folder / "two", SIZE) as two:
        with daemon.client() as client:
            paths = [client.attach(one, name="one").device, client.attach(two, name="two").device]
        try:
            each_step(step, lambda step: set_and_joined(daemon, step, storage, paths))
        finally:
            with daemon.client() as client:
                for path in paths:
                    client.detach(path, force=True)


def set_and_joined(daemon: OwnDaemon, step: int, storage: Path, paths: list[str]) -> bool:
    storage.write_bytes(bytes(STORAGE))
    data = os.urandom(4096)
    for path in paths:
        write_at(path, 0, data)

    def operation(client: Client) -> None:
        both = client.create_snapshot(paths, storage=[str(storage)], limit=2 * STORAGE).id
        younger = client.create_snapshot(paths, storage=[f"@{both}"]).id
        client.destroy_snapshots([younger])
        joined = client.create_snapshot(paths[:1], storage=[f"@{both}"]).id
        client.destroy_snapshots([both])
        client.destroy_snapshots([joined])

    with daemon.client() as client:
        stays = client.create_snapshot(paths, storage=[str(storage.parent)], limit=4 * SIZE)
        died = killed(daemon, step, operation)
    for path in paths:
        write_at(path, 0, os.urandom(4096))
    with daemon.client() as client:
        for snapshot in client.list_snapshots():
            assert client.check_snapshot(snapshot.id).trusted
            assert all(read_at(image.image, 0, 4096) == data for image in snapshot.images)
        others = [snapshot.id for snapshot in client.list_snapshots() if snapshot.id != stays.id]
        assert len(others) <= 2
        client.destroy_snapshots(others)
        assert storage.stat().st_size == STORAGE
        assert [snapshot.id for snapshot in client.list_snapshots()] == [stays.id]
        client.destroy_snapshots([stays.id])
    expect_only(daemon, 2, 0)
    return died


def write(file: Path) -> None:
    """Something else each time, down to the device; it would wait for ever on a file system that is frozen."""
    command = ["dd", "if=/dev/urandom", f"of={file}", "bs=64k", "count=1", "conv=fsync,notrunc", "status=none"]
    subprocess.run(command, check=True, timeout=60)


def assert_marked(ranges: list[list[int]], mount: Path) -> None:
    """The blocks of both files are in the ranges."""
    for name in ("first", "second"):
        for line in run("filefrag", "-b512", "-v", str(mount / name)).splitlines():
            fields = line.replace(":", " ").replace("..", " ").split()
            if fields and fields[0].isdecimal() and len(fields) > 4:
                start = int(fields[3]) * 512
                assert any(begin <= start < begin + length for begin, length in ranges), f"{name} at {start}"
