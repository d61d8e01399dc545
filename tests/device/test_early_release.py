# SPDX-License-Identifier: MIT
"""A write goes on when the old data is in a buffer, whether the storage answers or not; buffers outlive processes."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blksnap_ublk import forms
from demo import blocks
from tests.device_mapper import Mapped, mapped_table, missing_for_targets
from tests.direct_io import errno_of_read, read_at, write_at
from tests.killing import EVERYBODY, answers, kill, kill_and_wait
from tests.loop_devices import loop_device
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
SIZE = 16 * MIB
UNIT = 4096
WRITES = 20

missing = missing_for_targets("linear", "error")
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon() as running:
        yield running


@dataclass
class Silent:
    """A filtered device with a snapshot whose storage is suspended; `digest`: of the image at its instant."""

    daemon: OwnDaemon
    device: str
    snapshot: forms.Snapshot
    storage: Mapped
    table: str
    digest: str
    offsets: list[int]

    @property
    def image(self) -> str:
        return self.snapshot.images[0].image

    def overwrite(self) -> None:
        """Ends although the storage is silent."""
        for number, offset in enumerate(self.offsets):
            write_at(self.device, offset, bytes([number + 1]) * UNIT)

    def lose_what_waits(self) -> None:
        """The requests that wait in the storage fail; it answers then."""
        self.storage.load(f"0 {SIZE // 512} error")
        self.storage.load(self.table)

    def expect_written(self) -> None:
        for number, offset in enumerate(self.offsets):
            assert read_at(self.device, offset, UNIT) == bytes([number + 1]) * UNIT, f"a write at {offset} is lost"

    def expect_whole(self) -> None:
        with self.daemon.client() as client:
            assert client.check_snapshot(self.snapshot.id).trusted, self.daemon.log()
        assert blocks.sha256(self.image, SIZE) == self.digest, self.daemon.log()


@contextmanager
def silent(daemon: OwnDaemon, folder: Path) -> Iterator[Silent]:
    chance = random.Random(5)
    with ExitStack() as stack:
        (folder / "origin").write_bytes(chance.randbytes(SIZE))
        origin = stack.enter_context(loop_device(folder / "origin"))
        beneath = stack.enter_context(loop_device(folder / "storage", SIZE))
        table = f"0 {SIZE // 512} linear {beneath} 0"
        storage = stack.enter_context(mapped_table("blksnap-storage", table))
        with daemon.client() as client:
            device = client.attach(origin).device
            snapshot = client.create_snapshot([device], storage=[storage.path])
        digest = blocks.sha256(snapshot.images[0].image, SIZE)
        offsets = [unit * UNIT for unit in chance.sample(range(SIZE // UNIT), WRITES)]
        try:
            storage.suspend()
            yield Silent(daemon, device, snapshot, storage, table, digest, offsets)
        finally:
            storage.resume()
            wait_until("the daemon answers", lambda: answers(daemon))
            with daemon.client() as client:
                client.destroy_snapshots([snapshot.id], force=True)
                client.detach(device, force=True)


@pytest.mark.quick
def test_neither_writers_nor_readers_wait_for_the_storage(daemon: OwnDaemon, folder: Path) -> None:
    with silent(daemon, folder) as story:
        story.overwrite()
        story.expect_written()
        # Of the image too: what is not stored is in the buffers.
        story.expect_whole()
        story.storage.resume()
        story.expect_whole()


@pytest.mark.parametrize(
    "victims", [pytest.param(("io",), marks=pytest.mark.quick), ("io", "io"), ("io", "control")], ids="-".join
)
def test_what_is_not_stored_outlives_the_process(daemon: OwnDaemon, folder: Path, victims: tuple[str, ...]) -> None:
    """io is killed while the storage has nothing; the storage answers when another one serves the device."""
    with silent(daemon, folder) as story:
        story.overwrite()
        if victims == ("io", "io"):
            kill_and_wait(daemon, "io")
            kill_and_wait(daemon, "io")
        else:
            kill_and_wait(daemon, *victims)
        story.expect_written()
        story.storage.resume()
        wait_until("the image is served", lambda: is_served(daemon, story.snapshot))
        story.expect_whole()
        story.expect_written()
        state = daemon.runtime / "state"
        wait_until("buffers of the dead are gone", lambda: len(list(state.glob("buffers-*"))) == 1)


@pytest.mark.quick
def test_the_buffers_hold_what_nobody_has_stored(daemon: OwnDaemon, folder: Path) -> None:
    """All are killed, and their writes to the storage fail when nobody learns of it."""
    with silent(daemon, folder) as story:
        story.overwrite()
        kill(daemon, *EVERYBODY)
        story.lose_what_waits()
        daemon.start()
        wait_until("the daemon answers", lambda: answers(daemon))
        story.expect_written()
        wait_until("the image is served", lambda: is_served(daemon, story.snapshot))
        story.expect_whole()


def test_what_was_not_stored_and_is_lost_breaks_the_snapshot(daemon: OwnDaemon, folder: Path) -> None:
    """Neither the buffers nor the writes of a dead io process are left: checksums tell."""
    with silent(daemon, folder) as story:
        story.overwrite()
        for path in (daemon.runtime / "state").glob("buffers-*"):
            path.unlink()
        kill(daemon, "io")
        story.lose_what_waits()
        wait_until("the daemon answers", lambda: answers(daemon))
        story.expect_written()
        for offset in story.offsets:
            assert errno_of_read(story.image, offset, UNIT) == errno.EIO, daemon.log()
        assert state_of(daemon, story.snapshot) == "corrupted"


def test_a_storage_that_stays_silent_takes_the_snapshot_and_nothing_else(daemon: OwnDaemon, folder: Path) -> None:
    with silent(daemon, folder) as story:
        story.overwrite()
        kill(daemon, "io")
        wait_until("the daemon answers", lambda: answers(daemon))
        story.expect_written()
        wait_until("the snapshot is broken", lambda: state_of(daemon, story.snapshot) == "corrupted")
        write_at(story.device, 0, b"x" * UNIT)
        assert read_at(story.device, 0, UNIT) == b"x" * UNIT


def state_of(daemon: OwnDaemon, snapshot: forms.Snapshot) -> str:
    with daemon.client() as client:
        return client.show_snapshot(snapshot.id).state.value


def is_served(daemon: OwnDaemon, snapshot: forms.Snapshot) -> bool:
    """Whether its image can be read."""
    try:
        return len(read_at(snapshot.images[0].image, 0, UNIT)) == UNIT and answers(daemon)
    except OSError:
        return False
