# SPDX-License-Identifier: MIT
"""The control process killed at any moment of an operation: it comes back, and finishes or undoes what it was at."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from blksnap_ublk.errors import BlksnapError
from tests.own_daemon import PATIENCE, Disks, OwnDaemon, disks, own_daemon, state_kinds, ublk_nodes, wait_until

SIZE = 32 << 20
MOMENTS = 5


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def two(daemon: OwnDaemon) -> Iterator[Disks]:
    with disks(SIZE) as made:
        (made.directory / "storage").write_bytes(bytes(4 << 20))
        yield made


def interrupt(daemon: OwnDaemon, operation: str, after: float) -> None:
    """Lets another process call an operation of the client, and kills the control process after so many seconds."""
    script = (
        "import sys; from blksnap_ublk.client import connect\n"
        f"client = connect({str(daemon.runtime / 'io.blksnap.Ublk')!r})\n"
        "print(flush=True)\n"
        f"client.{operation}\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert caller.stdout is not None
    caller.stdout.readline()
    time.sleep(after)
    control = daemon.pid("control")
    os.kill(control, signal.SIGKILL)
    caller.communicate()
    wait_until("another control process runs", lambda: daemon.replaced("control", control))
    answered(daemon, lambda: None)


def answered(daemon: OwnDaemon, then: Callable[[], None]) -> None:
    def answers() -> bool:
        try:
            with daemon.client() as client:
                client.list_devices()
        except BlksnapError:
            return False
        return True

    wait_until("the daemon answers", answers)
    then()


def expect_only(daemon: OwnDaemon, devices: int, snapshots: int) -> None:
    """Nothing exists but what so many devices and snapshots have, as soon as what is left was given back."""
    expected = sorted(["device"] * devices + ["image", "records", "storage"] * snapshots)
    wait_until(f"there is {expected or 'nothing'}", lambda: state_kinds(daemon) == expected)
    assert len(ublk_nodes()) == 2 * (devices + snapshots), daemon.log()


@seed(0)
@settings(
    max_examples=MOMENTS, deadline=None, derandomize=False, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(after=st.floats(0, 0.6))
def test_during_attach(daemon: OwnDaemon, two: Disks, after: float) -> None:
    interrupt(daemon, f"attach({two.origin!r}, name='data')", after)
    with daemon.client() as client:
        devices = client.list_devices()
        expect_only(daemon, len(devices), 0)
        if not devices:
            client.attach(two.origin, name="data")
        expect_only(daemon, 1, 0)
        client.detach("data")
        expect_only(daemon, 0, 0)
    os.close(os.open(two.origin, os.O_RDWR | os.O_EXCL))


@settings(max_examples=MOMENTS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(after=st.floats(0, 0.6))
def test_during_create(daemon: OwnDaemon, two: Disks, after: float) -> None:
    storage = two.directory / "storage"
    with daemon.client() as client:
        device = client.attach(two.origin, name="data").device
    try:
        write(device, 1)
        interrupt(daemon, f"create_snapshot(['data'], storage=[{str(storage)!r}])", after)
        with daemon.client() as client:
            snapshots = client.list_snapshots()
            expect_only(daemon, 1, len(snapshots))
            for snapshot in snapshots:
                assert client.check_snapshot(snapshot.id).trusted
                assert Path(snapshot.images[0].image).read_bytes()[:4096] == bytes([1]) * 4096
            taken = client.describe_changes("data").change_number
            # Whatever was taken of the change map, nothing of it is lost.
            write(device, 2)
            client.destroy_snapshots([snapshot.id for snapshot in snapshots])
            last = client.create_snapshot(["data"], storage=[str(storage)])
            assert last.images[0].change_number == taken + 1
            changes = client.changes("data")
            assert not changes.all
            assert changes.ranges[0].tolist() == [0, 65536]
            client.destroy_snapshots([last.id])
            expect_only(daemon, 1, 0)
    finally:
        with daemon.client() as client:
            client.detach("data", force=True)
    assert storage.stat().st_size == 4 << 20


@settings(max_examples=MOMENTS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(after=st.floats(0, 0.5))
def test_during_destroy_and_detach(daemon: OwnDaemon, two: Disks, after: float) -> None:
    with daemon.client() as client:
        client.attach(two.origin, name="data")
        snapshot = client.create_snapshot(["data"], storage=[str(two.directory / "storage")])
    interrupt(daemon, f"destroy_snapshots([{snapshot.id!r}])", after)
    with daemon.client() as client:
        left = client.list_snapshots()
        expect_only(daemon, 1, len(left))
        client.destroy_snapshots([each.id for each in left])
    interrupt(daemon, "detach('data')", after)
    with daemon.client() as client:
        devices = client.list_devices()
        expect_only(daemon, len(devices), 0)
        for each in devices:
            client.detach(each.device)
    expect_only(daemon, 0, 0)


def kill(daemon: OwnDaemon, role: str) -> None:
    """Returns when another process has its place, and the daemon answers."""
    former = daemon.pid(role)
    os.kill(former, signal.SIGKILL)
    wait_until(f"another {role} process runs", lambda: daemon.replaced(role, former))
    answered(daemon, lambda: None)


def test_a_damaged_catalogue_disturbs_no_device(daemon: OwnDaemon, two: Disks) -> None:
    with daemon.client() as client:
        device = client.attach(two.origin, name="data")
        snapshot = client.create_snapshot(["data"], storage=[str(two.directory / "storage")])
    write(device.device, 3)
    for path in (daemon.runtime / "state" / "catalogue").glob("*-*.*"):
        path.write_bytes(path.read_bytes()[:-20])
    kill(daemon, "control")
    with daemon.client() as client:
        (found,) = client.list_devices()
        assert (found.device, found.origin, found.state.value) == (device.device, device.origin, "live")
        assert (found.generation, found.change_number) == (device.generation, 1)
        assert found.data_path == device.data_path
        assert client.list_snapshots() == []
        assert "rebuilt" in daemon.log()
        expect_only(daemon, 1, 0)
        last = client.create_snapshot([found.name], storage=[str(two.directory / "storage")])
        changes = client.changes(found.name, since=snapshot.images[0].cursor)
        assert changes.ranges.tolist() == [[0, 65536]]
        client.destroy_snapshots([last.id])
        client.detach(found.device)
    expect_only(daemon, 0, 0)


def test_the_io_process_dies_while_an_image_is_read(daemon: OwnDaemon, two: Disks) -> None:
    """And nothing of the state of the image is left."""
    with daemon.client() as client:
        device = client.attach(two.origin, name="data").device
        snapshot = client.create_snapshot(["data"], storage=[str(two.directory / "storage")])
    image = snapshot.images[0].image
    (daemon.runtime / "state" / f"image-{snapshot.id}.0").unlink()
    reader = subprocess.Popen(
        ["dd", f"if={image}", "of=/dev/null", "bs=4096", "iflag=direct", "status=none"], stderr=subprocess.PIPE
    )
    kill(daemon, "io")
    wait_until("the device is live", lambda: states(daemon) == ["live"])
    reader.communicate(timeout=PATIENCE)
    write(device, 4)
    with daemon.client() as client:
        assert not client.check_snapshot(snapshot.id).trusted
        shown = client.show_snapshot(snapshot.id)
        assert (shown.state.value, shown.error) == ("corrupted", f"the state of the image of {two.origin} is gone")
        client.destroy_snapshots([snapshot.id])
        expect_only(daemon, 1, 0)
        # The change map lives on: what was written before and after is in the next increment.
        last = client.create_snapshot(["data"], storage=[str(two.directory / "storage")])
        changes = client.changes("data", since=snapshot.images[0].cursor)
        assert changes.ranges.tolist() == [[0, 65536]]
        client.destroy_snapshots([last.id])
        client.detach("data")
    expect_only(daemon, 0, 0)


def states(daemon: OwnDaemon) -> list[str]:
    with daemon.client() as client:
        return [device.state.value for device in client.list_devices()]


def write(device: str, value: int) -> None:
    """4 KiB at the beginning, past the page cache."""
    command = f"import sys; sys.stdout.buffer.write(bytes([{value}]) * 4096)"
    data = subprocess.run([sys.executable, "-c", command], capture_output=True, check=True).stdout
    subprocess.run(["dd", f"of={device}", "bs=4096", "oflag=direct", "status=none"], input=data, check=True)
