# SPDX-License-Identifier: MIT
"""What a dead io process has sent can still land: nothing newer meets it, on the origin or in the storage.

Where the kernel registers the pages of requests (since 6.16), these keep a device from being recovered too, for as long
as I/O of its own requests is under way: there the tests of those cannot fail for want of the barrier.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError, Busy
from blksnap_ublk.forms import DeviceState
from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.ring_locks import RingLocks
from tests.device_mapper import Mapped, mapped_table, missing_for_targets
from tests.direct_io import errno_of_read, errno_of_write, read_at, write_at
from tests.filtered import Filtered, filtered
from tests.loop_devices import loop_device, run
from tests.own_daemon import OwnDaemon, wait_until

SIZE = 32 << 20
SECTORS = SIZE // 512
LATE_WRITES = "delay {disk} 0 0 {disk} 0 6000 {disk} 0 0"
"""A dm table: writes land so many milliseconds late, long after another io process could have come up."""
LENGTH = 64 << 10
OLD, FIRST, SECOND = (bytes([value]) * LENGTH for value in (1, 2, 3))
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F

missing = missing_for_targets("linear", "delay")
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


class Started(threading.Thread):
    """Calls of a program that may have to wait in the kernel, one after another; `ended` is what they returned."""

    def __init__(self, *calls: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._calls = calls
        self.ended: list[object] = []
        self.start()

    def run(self) -> None:
        self.ended.extend(call() for call in self._calls)

    def all_ended(self) -> bool:
        return len(self.ended) == len(self._calls)


@contextmanager
def late_disk(folder: Path) -> Iterator[tuple[Mapped, str]]:
    """A disk whose writes land late, and the quick one beneath it."""
    with ExitStack() as stack:
        disk = stack.enter_context(loop_device(folder / "late", SIZE))
        yield stack.enter_context(mapped_table("blksnap-late", f"0 {SECTORS} {LATE_WRITES.format(disk=disk)}")), disk


@contextmanager
def silent_disk(folder: Path) -> Iterator[tuple[str, Mapped]]:
    """A disk, and the one beneath it: suspended, it keeps what the upper one has sent it, which counts that."""
    with ExitStack() as stack:
        disk = stack.enter_context(loop_device(folder / "silent", SIZE))
        beneath = stack.enter_context(mapped_table("blksnap-beneath", f"0 {SECTORS} linear {disk} 0"))
        upper = stack.enter_context(mapped_table("blksnap-upper", f"0 {SECTORS} linear {beneath.path} 0"))
        yield upper.path, beneath


def in_flight(disk: str) -> tuple[int, int]:
    """Reads and writes that a disk has been sent and has not completed."""
    reads, writes = Path(f"/sys/block/{Path(disk).name}/inflight").read_text().split()
    return int(reads), int(writes)


def delayed(slow: Mapped) -> int:
    """Writes that a dm device of the target `delay` holds back."""
    return int(run("dmsetup", "status", slow.name).split()[4])


def kill_io(daemon: OwnDaemon) -> None:
    """kill -9, and another process is there."""
    former = daemon.pid("io")
    os.kill(former, signal.SIGKILL)
    wait_until("another io process", lambda: daemon.replaced("io", former))


def is_recovering(client: Client, disk: Filtered) -> bool:
    state = next(device.state for device in client.list_devices() if device.device == disk.path)
    assert state in (DeviceState.LIVE, DeviceState.RECOVERING)
    return state is DeviceState.RECOVERING


def block_ioctl(path: str, request: int) -> None:
    """BLKDISCARD or BLKZEROOUT of the first bytes of a disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, request, struct.pack("=QQ", 0, LENGTH))
    finally:
        os.close(descriptor)


def expect_the_newer(daemon: OwnDaemon, client: Client, folder: Path, way: str, first: Callable[[str], object]) -> None:
    """`first` is on its way to a slow origin at the death; a write over it is acknowledged afterwards, and stays."""
    with ExitStack() as stack:
        slow, disk = stack.enter_context(late_disk(folder))
        write_at(disk, 0, OLD)
        device = stack.enter_context(filtered(client, slow.path, way, folder))
        program = Started(lambda: first(device.path), lambda: write_at(device.path, 0, SECOND))
        wait_until("the first request is on its way", lambda: delayed(slow) > 0)
        replace_origin(daemon, disk)
        kill_io(daemon)
        wait_until("the second request is acknowledged", program.all_ended)
        assert read_at(device.path, 0, LENGTH) == SECOND
        wait_until("all that was on its way has landed", lambda: delayed(slow) == 0 and in_flight(disk) == (0, 0))
        assert read_at(device.path, 0, LENGTH) == SECOND
        assert read_at(disk, 0, LENGTH) == SECOND


def test_no_write_of_the_dead_lands_on_a_newer_one(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    expect_the_newer(daemon, client, folder, way, lambda path: write_at(path, 0, FIRST))


@pytest.mark.parametrize("request_of", [BLKZEROOUT, BLKDISCARD], ids=["zeroes", "discard"])
def test_no_zeroes_or_discard_of_the_dead_lands_on_a_newer_write(
    daemon: OwnDaemon, client: Client, folder: Path, request_of: int
) -> None:
    if request_of == BLKDISCARD and not discards_are_offered():
        pytest.skip("this kernel is too old for discards")
    expect_the_newer(daemon, client, folder, "copy", lambda path: block_ioctl(path, request_of))


def discards_are_offered() -> bool:
    """Since Linux 6.12."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (6, 12)


def test_no_replayed_trim_of_the_dead_lands_on_a_newer_write(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    """A trim that was swallowed under a snapshot is sent after it, and belongs to no request of the device."""
    if not discards_are_offered():
        pytest.skip("this kernel is too old for discards")
    with ExitStack() as stack:
        slow, disk = stack.enter_context(late_disk(folder))
        write_at(disk, 0, OLD)
        device = stack.enter_context(filtered(client, slow.path, way, folder))
        snapshot = device.snapshot(storage_file(folder))
        block_ioctl(device.path, BLKDISCARD)
        assert delayed(slow) == 0
        Started(lambda: destroyed_or_not(device, snapshot))
        wait_until("the trim is on its way", lambda: delayed(slow) > 0)
        replace_origin(daemon, disk)
        kill_io(daemon)
        write_at(device.path, 0, SECOND)
        wait_until("the trim has landed", lambda: delayed(slow) == 0 and in_flight(disk) == (0, 0))
        assert read_at(device.path, 0, LENGTH) == SECOND


def destroyed_or_not(disk: Filtered, snapshot: forms.Snapshot) -> None:
    """Destroys a snapshot; fails when the io process dies meanwhile, and then the next one goes on with it."""
    with suppress(BlksnapError):
        disk.destroy(snapshot)


def storage_file(folder: Path) -> Path:
    """A file for difference storage."""
    with (folder / "storage").open("wb") as storage:
        storage.truncate(SIZE)
    return folder / "storage"


def replace_origin(daemon: OwnDaemon, disk: str) -> None:
    """The next io process gets the quick disk beneath the slow origin, so that nothing of its own is late."""
    with KeeperClient(daemon.runtime / "keeper.sock") as keeper:
        (name,) = (name for name in keeper.names() if name.startswith("origin:"))
        descriptor = os.open(disk, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            keeper.put(name, descriptor)
        finally:
            os.close(descriptor)


def test_recovery_waits_for_reads_of_images(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    """Rings of images hold the origin's device as its own rings do: their I/O is I/O on the origin."""
    with ExitStack() as stack:
        origin, beneath = stack.enter_context(silent_disk(folder))
        write_at(origin, 0, OLD)
        device = stack.enter_context(filtered(client, origin, way, folder))
        image = device.snapshot(storage_file(folder)).images[0].image
        beneath.suspend()
        try:
            reader = Started(lambda: errno_of_read(image, 0, LENGTH))
            wait_until("the image reads the origin", lambda: in_flight(origin)[0] > 0)
            kill_io(daemon)
            wait_until("the device is being recovered", lambda: is_recovering(client, device))
            while "tried again" not in daemon.log():
                assert is_recovering(client, device), "recovered although the image's read is under way"
                time.sleep(0.05)
            with pytest.raises(Busy, match="origin does not answer"):
                client.detach(device.path, force=True)
        finally:
            beneath.resume()
        wait_until("the device is recovered", lambda: not is_recovering(client, device))
        wait_until("the reader is served again", reader.all_ended)
        assert reader.ended == [0], daemon.log()
        assert read_at(device.path, 0, LENGTH) == OLD


def test_a_silent_storage_does_not_hold_recovery_back_but_keeps_its_lock(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    """What the dead one writes there may land late: until then the lock says so, and nobody else gets the place."""
    locks = RingLocks(daemon.runtime / "state")
    with ExitStack() as stack:
        origin = stack.enter_context(loop_device(folder / "disk", SIZE))
        storage, beneath = stack.enter_context(silent_disk(folder))
        write_at(origin, 0, OLD)
        device = stack.enter_context(filtered(client, origin, way, folder))
        snapshot = device.snapshot(storage)
        beneath.suspend()
        try:
            writer = Started(lambda: errno_of_write(device.path, 0, FIRST))
            wait_until("old data is on its way to the storage", lambda: in_flight(storage)[1] > 0)
            (daemon.runtime / "state" / f"image-{snapshot.id}.0").unlink()  # it cannot go on
            kill_io(daemon)
            wait_until("the writer is served again", writer.all_ended)
            assert writer.ended == [0]
            assert read_at(device.path, 0, LENGTH) == FIRST
            assert locks.of_dead()
            assert device.state_of(snapshot) == "corrupted"
            with pytest.raises(Busy, match="storage does not answer"):
                device.destroy(snapshot)
        finally:
            beneath.resume()
        wait_until("the last storage write has ended", lambda: not locks.of_dead())
        device.destroy(snapshot)
