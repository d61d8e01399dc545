# SPDX-License-Identifier: MIT
"""The io process dies while something else is under way: devices come back, and nothing takes another one with it."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.forms import DeviceState
from tests.device_mapper import mapped_table, missing_for_targets
from tests.direct_io import read_at, write_at
from tests.loop_devices import loop_device, mounted
from tests.own_daemon import OwnDaemon, wait_until

SIZE = 64 << 20
DATA = b"d" * 4096

missing = missing_for_targets("linear")
needs_mapper = pytest.mark.skipif(missing is not None, reason=str(missing))


def kill_io(daemon: OwnDaemon) -> None:
    """kill -9, and another process is there."""
    former = daemon.pid("io")
    os.kill(former, signal.SIGKILL)
    wait_until("another io process", lambda: daemon.pid("io") != former)


def all_live(client: Client) -> bool:
    return all(device.state is DeviceState.LIVE for device in client.list_devices())


def test_a_lost_snapshot_does_not_take_another_device_with_it(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    """The id of its image's device is given to the next device."""
    (folder / "storage").write_bytes(bytes(4 << 20))
    with loop_device(folder / "first", SIZE) as first, loop_device(folder / "second", SIZE) as second:
        device = client.attach(first).device
        snapshot = client.create_snapshot([device], storage=[str(folder / "storage")])
        kill_io(daemon)
        wait_until("the snapshot is lost", lambda: client.show_snapshot(snapshot.id).state.value == "corrupted")
        wait_until("its image is gone", lambda: client.show_snapshot(snapshot.id).images[0].image == "")
        wait_until("the device is back", lambda: all_live(client))
        other = client.attach(second).device
        assert other == snapshot.images[0].image
        write_at(other, 0, DATA)
        client.destroy_snapshots([snapshot.id])
        write_at(other, len(DATA), DATA)
        assert read_at(other, 0, 2 * len(DATA)) == 2 * DATA
        client.detach(other)
        client.detach(device)
        assert read_at(second, 0, 2 * len(DATA)) == 2 * DATA


@needs_mapper
def test_recovery_does_not_wait_for_a_freeze_that_waits_for_it(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    """What is dirty is written before the freeze: to a device that has no server any more."""
    mount = folder / "mount"
    mount.mkdir()
    (folder / "storage").write_bytes(bytes(4 << 20))
    with ExitStack() as stack:
        disk = stack.enter_context(loop_device(folder / "disk", SIZE))
        origin = stack.enter_context(mapped_table("blksnap-origin", f"0 {SIZE // 512} linear {disk} 0"))
        device = client.attach(origin.path).device
        stack.callback(client.detach, device)
        stack.enter_context(mounted(device, mount))
        (mount / "file").write_bytes(bytes(16 << 20))
        origin.suspend()
        try:
            create = ("snapshot", "create", device, "--storage", str(folder / "storage"))
            with ThreadPoolExecutor(1) as threads:
                created = threads.submit(daemon.cli, *create)
                wait_until("dirty data is on its way", lambda: writes_in_flight(device) > 0)
                kill_io(daemon)
                origin.resume()
                assert "the io process died" in created.result().stderr
        finally:
            origin.resume()
        wait_until("the device is back", lambda: all_live(client))
        assert client.list_snapshots() == []
        (mount / "other").write_bytes(DATA)
        os.sync()
        client.destroy_snapshots([client.create_snapshot([device], storage=[str(folder / "storage")]).id])


def writes_in_flight(disk: str) -> int:
    return int(Path(f"/sys/block/{Path(disk).name}/inflight").read_text().split()[1])
