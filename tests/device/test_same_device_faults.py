# SPDX-License-Identifier: MIT
"""Storage on the snapshotted device itself when processes die: nothing is lost, stays immutable, or is written late.

A file system that waits for its device keeps whoever asks it waiting: that must not be who brings the device back.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError, Busy, NotFound
from blksnap_ublk.forms import DeviceState
from demo import blocks
from tests.device.test_killed_control import PROGRAM, answers, expect_only, killed
from tests.fio import fio_verify
from tests.fio_load import fio_load
from tests.own_daemon import OwnDaemon, own_daemon, wait_until
from tests.same_device import MIB, STORAGE, OnFiltered, free, is_immutable, on_filtered, write_files
from tests.seeds import dice

STEPS = 60
ROUNDS = 6


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon([str(PROGRAM)]) as running:
        yield running


def kill(daemon: OwnDaemon, *roles: str) -> None:
    """kill -9 of these processes at once, and others are there."""
    former = {role: daemon.pid(role) for role in roles}
    for pid in former.values():
        os.kill(pid, signal.SIGKILL)
    for role, pid in former.items():
        wait_until(f"another {role} process", lambda role=role, pid=pid: daemon.replaced(role, pid))  # type: ignore[misc]
    wait_until("the daemon answers", lambda: answers(daemon))
    wait_until("all devices are back", lambda: all_live(daemon))


def all_live(daemon: OwnDaemon) -> bool:
    with suppress(BlksnapError), daemon.client() as client:
        return all(device.state is DeviceState.LIVE for device in client.list_devices())
    return False


def destroy_all(daemon: OwnDaemon) -> None:
    """Also those whose io process has died, as soon as its last write has ended."""

    def gone() -> bool:
        with daemon.client() as client:
            for snapshot in client.list_snapshots():
                with suppress(Busy, NotFound):
                    client.destroy_snapshots([snapshot.id])
            return not client.list_snapshots()

    wait_until("all snapshots are destroyed", gone)


def is_tidy(daemon: OwnDaemon) -> bool:
    """Nothing exists but what one device has; the control process may not have found yet that io has died."""
    with suppress(AssertionError):
        expect_only(daemon, 1, 0)
        return True
    return False


def expect_given_back(on: OnFiltered, file: Path, size: int, free_before: int) -> None:
    """The file is as it was, and all space that was reserved is free; a helper may be a moment late."""
    wait_until("the file is as it was", lambda: not is_immutable(file) and file.stat().st_size == size)
    # A file that was cut back keeps the tree of its extents.
    wait_until("all space is free", lambda: free(on.top) >= free_before - (64 << 10))


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_the_io_process_dies_under_load(daemon: OwnDaemon, folder: Path, kind: str) -> None:
    """The snapshot lives on; its blocks are given back when nobody writes to them any more, and count as changed."""
    with daemon.client() as client, on_filtered(client, folder, kind) as on:
        file = on.top / "storage"
        file.write_bytes(bytes(4 * MIB))
        first = on.disk.snapshot(folder)
        backup = folder / "backup"
        blocks.full_copy(on.image_of(first), on.disk.size, backup)
        on.disk.destroy(first)
        files = write_files(on.top, 1)
        before = free(on.top)
        snapshot = on.take(file)
        with fio_load(str(on.top / "fio"), size="8m") as load:
            load.wait_for_round()
            kill(daemon, "io")
            load.wait_for_round()
            wait_until("the device is back", lambda: all_live(daemon))
            on.check_image(snapshot, files)
            assert is_immutable(file)
            destroy_all(daemon)
            load.wait_for_round()
        (on.top / "fio").unlink()
        expect_given_back(on, file, 4 * MIB, before)
        last = on.disk.snapshot(folder)
        on.disk.expect_increment(backup, first.images[0].cursor, last)
        on.disk.destroy(last)
        backup.unlink()
        again = on.take(file)
        fio_verify(str(on.top / "fio"), size="8m")
        assert client.show_snapshot(again.id).state.value == "active"


@pytest.mark.parametrize("roles", [("io",), ("control",), ("io", "control")], ids="+".join)
def test_processes_die_while_storage_is_made_and_given_back(
    daemon: OwnDaemon, folder: Path, roles: tuple[str, ...]
) -> None:
    """At any moment of a create and a destroy."""
    chance = dice()
    with daemon.client() as client, on_filtered(client, folder, "ext4") as on:
        files = write_files(on.top, 1)
        file = on.top / "storage"
        file.write_bytes(bytes(4 * MIB))
        before = free(on.top)
        for n in range(ROUNDS):
            worker = threading.Thread(target=create_and_destroy, args=(daemon, on, file if n % 2 else on.top))
            began = time.monotonic()
            worker.start()
            time.sleep(chance.uniform(0, 3))
            kill(daemon, *roles)
            worker.join()
            print(f"{time.monotonic() - began:.1f} s", flush=True)
            destroy_all(daemon)
            wait_until("nothing is left over", lambda: is_tidy(daemon))
            expect_given_back(on, file, 4 * MIB, before)
            fio_verify(str(on.top / "fio"), size="1m")
            (on.top / "fio").unlink()
        with daemon.client() as other:
            snapshot = other.create_snapshot([on.disk.path], storage=[str(file)], limit=STORAGE)
            on.check_image(snapshot, files)
            other.destroy_snapshots([snapshot.id])


def create_and_destroy(daemon: OwnDaemon, on: OnFiltered, storage: Path) -> None:
    try:
        with daemon.client() as client:
            snapshot = client.create_snapshot([on.disk.path], storage=[str(storage)], limit=STORAGE)
            print("taken", flush=True)
            client.destroy_snapshots([snapshot.id])
            print("destroyed", flush=True)
    except BlksnapError as error:
        print(error, flush=True)


def test_the_control_process_dies_before_a_step(daemon: OwnDaemon, folder: Path) -> None:
    """Drawn steps of create and destroy; `ALL_STEPS=N` in the environment goes through all from the Nth on."""
    with daemon.client() as client, on_filtered(client, folder, "ext4") as on:
        file = on.top / "storage"
        file.write_bytes(bytes(4 * MIB))
        before = free(on.top)

        def operation(client: Client) -> None:
            snapshot = client.create_snapshot([on.disk.path], storage=[str(file)], limit=16 * MIB)
            client.destroy_snapshots([snapshot.id])

        for step in steps():
            print(f"before step {step}", flush=True)
            died = killed(daemon, step, operation)
            fio_verify(str(on.top / "fio"), size="1m")
            (on.top / "fio").unlink()
            with daemon.client() as client:
                for snapshot in client.list_snapshots():
                    assert client.check_snapshot(snapshot.id).trusted
                    assert is_immutable(file)
                    client.destroy_snapshots([snapshot.id])
            wait_until("nothing is left over", lambda: is_tidy(daemon))
            expect_given_back(on, file, 4 * MIB, before)
            if not died and "ALL_STEPS" in os.environ:
                break


def steps() -> list[int]:
    if "ALL_STEPS" in os.environ:
        return list(range(int(os.environ["ALL_STEPS"]), 1000))
    return sorted(dice().sample(range(1, STEPS), ROUNDS))
