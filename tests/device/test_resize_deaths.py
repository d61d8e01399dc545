# SPDX-License-Identifier: MIT
"""Processes die within a resize: the device goes on, nothing that changed is forgotten, and it can be resized."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.host import blockdev
from demo import blocks
from tests.direct_io import write_at
from tests.loop_devices import loop_device, run
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
SIZE = 16 * MIB
STEP = MIB + 4096
PROGRAM = Path(__file__).parents[1] / "killed_control.py"
MOST_STEPS = 12


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon([str(PROGRAM)]) as daemon:
        yield daemon


def answers(daemon: OwnDaemon) -> bool:
    with suppress(BlksnapError), daemon.client() as client:
        return all(device.state == "live" for device in client.list_devices())
    return False


def killed(daemon: OwnDaemon, client: Client, origin: str, step: int, *, io: bool) -> bool:
    """A resize in which the control process, and with `io` the io process too, dies before a step; False if it has
    fewer steps, and was done.
    """
    order = daemon.runtime / "kill-before"
    control, serving = daemon.pid("control"), daemon.pid("io")
    order.write_text(str(step))
    with suppress(BlksnapError):
        client.resize(origin)
    died = not order.exists()
    order.unlink(missing_ok=True)
    if died:
        if io:
            os.kill(serving, signal.SIGKILL)
            wait_until("another io process", lambda: daemon.replaced("io", serving))
        wait_until("another control process", lambda: daemon.replaced("control", control))
        wait_until("it answers", lambda: answers(daemon))
    return died


@pytest.mark.parametrize("io", [False, True], ids=["control", "control and io"])
def test_death_before_any_step(daemon: OwnDaemon, folder: Path, io: bool) -> None:
    disk, copy = folder / "disk", folder / "copy"
    reasons = set()
    with loop_device(disk, SIZE) as origin, daemon.client() as client:
        device = client.attach(origin).device
        try:
            snapshot = client.create_snapshot([device], storage=[str(folder)], limit=SIZE)
            blocks.full_copy(snapshot.images[0].image, SIZE, copy)
            cursor = snapshot.images[0].cursor
            client.destroy_snapshots([snapshot.id])
            size = SIZE
            for step in range(1, MOST_STEPS):
                write_at(device, step * 100 * 4096, os.urandom(4096))
                size += STEP
                os.truncate(disk, size)
                run("losetup", "-c", origin)
                died = killed(daemon, client, origin, step, io=io)
                write_at(device, step * 101 * 4096, os.urandom(4096))
                assert client.resize(origin).device.size == size
                assert blockdev.describe(device).size == size
                write_at(device, size - 4096, os.urandom(4096))
                snapshot = client.create_snapshot([device], storage=[str(folder)], limit=size)
                changes = client.changes(device, since=cursor, until=snapshot.id)
                reasons.add(changes.reason)
                os.truncate(copy, size)
                ranges = [(int(start), int(length)) for start, length in changes.ranges]
                blocks.apply(snapshot.images[0].image, ranges, copy)
                assert blocks.first_difference(snapshot.images[0].image, size, copy) is None
                cursor = snapshot.images[0].cursor
                client.destroy_snapshots([snapshot.id])
                if not died:
                    break
            assert not died, "there are more steps"
            assert step > 4
        finally:
            wait_until("it answers", lambda: answers(daemon))
            client.detach(origin, force=True)
    assert reasons == ({None, "resized"} if io else {None})
