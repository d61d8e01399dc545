# SPDX-License-Identifier: MIT
"""A filtered device under fio with two snapshots of one instant's content: the storage of one goes wrong, that of the
other does not; and what must hold whatever goes wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from tests.direct_io import errno_of_read, read_at, write_at
from tests.filtered import Filtered, filtered
from tests.fio_load import FioLoad, fio_load
from tests.loop_devices import loop_device
from tests.own_daemon import OwnDaemon, wait_until

MIB = 1 << 20
UNIT = 4096
SIZE = 24 * MIB
LOADED = 16 * MIB
"""Bytes that fio writes to; what lies behind them is the test's."""
PIECE = 64 << 10


@dataclass
class LostStorage:
    """`copy` is what the device held when both snapshots were taken; it has no piece of zeroes."""

    daemon: OwnDaemon
    client: Client
    disk: Filtered
    copy: Path
    healthy: forms.Snapshot
    suspect: forms.Snapshot
    load: FioLoad
    _next: int = field(default=LOADED)

    @property
    def image(self) -> str:
        """Of the snapshot whose storage goes wrong."""
        return self.suspect.images[0].image

    def show(self) -> forms.Snapshot:
        """That snapshot as it is now."""
        return self.client.show_snapshot(self.suspect.id)

    def overwrite(self, length: int = PIECE) -> None:
        """Overwrites something that was never overwritten: both snapshots need it preserved."""
        assert self._next + length <= SIZE, "nothing is left to overwrite"
        data = os.urandom(length)
        start, self._next = self._next, self._next + length
        write_at(self.disk.path, start, data)
        assert read_at(self.disk.path, start, length) == data

    def wait_until_lost(self) -> None:
        """Returns when the snapshot is not active any more."""
        wait_until("the snapshot is lost", lambda: self.disk.state_of(self.suspect) != "active")

    def read_image(self) -> int:
        """Reads all of the image: each piece is as it was, or EIO. How many are EIO."""
        refused = 0
        content = self.copy.read_bytes()
        for start in range(0, SIZE, PIECE):
            try:
                found = read_at(self.image, start, PIECE)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                refused += 1
            else:
                assert found == content[start : start + PIECE], f"wrong data in the image at {start}"
        return refused

    def expect_lost(self, state: str, reason: str) -> None:
        """The snapshot is marked and says why; its image gives EIO everywhere; there was one event that says so."""
        # Writers do not wait for the storage: what it says comes later.
        self.wait_until_lost()
        shown = self.show()
        assert (shown.state.value, shown.images[0].state.value) == (state, state), self.daemon.log()
        assert reason in str(shown.error), shown.error
        reads = [errno_of_read(self.image, start, UNIT) for start in (0, LOADED, SIZE - UNIT)]
        assert reads == [errno.EIO] * 3, reads
        checked = self.client.check_snapshot(self.suspect.id)
        assert not checked.trusted
        assert reason in str(checked.reason), checked.reason
        wanted = {"overflown": "overflow", "corrupted": "corrupted"}[state]
        wait_until("an event tells of it", lambda: self._told() != [])
        told = [(event.type, event.data["error"]) for event in self._told()]
        assert told == [(wanted, shown.error)], told

    def expect_active(self) -> None:
        """The snapshot is active, nobody was told otherwise, and its image is right."""
        assert self.disk.state_of(self.suspect) == "active", self.show().error
        self.disk.expect_equal(self.image, self.copy)
        assert self.disk.state_of(self.suspect) == "active", self.show().error
        assert self._told() == [], self._told()

    def expect_healthy(self) -> None:
        """The other snapshot is active and right."""
        assert self.disk.state_of(self.healthy) == "active", self.client.show_snapshot(self.healthy.id).error
        self.disk.expect_equal(self.healthy.images[0].image, self.copy)

    def events(self, *types: str) -> list[forms.Event]:
        """What was told of the snapshot whose storage goes wrong, of these types."""
        return [event for event in self.client.events(snapshot=self.suspect.id) if event.type in types]

    def wait_for_event(self, kind: str) -> forms.Event:
        """The first event of a type, once there is one."""
        wait_until(f"an event {kind}", lambda: self.events(kind) != [])
        return self.events(kind)[0]

    def _told(self) -> list[forms.Event]:
        return self.events("overflow", "corrupted")


@contextmanager
def lost_storage(
    daemon: OwnDaemon,
    client: Client,
    folder: Path,
    way: str,
    storage: str,
    *,
    limit: int | None = None,
    on_overflow: str = "break",
    rate: str = "12m",
) -> Iterator[LostStorage]:
    """`storage` is the SPEC of what goes wrong; fio has begun to overwrite, at `rate` bytes a second, when it begins.

    At its end: fio has verified all that it wrote, also what it wrote before and while it went wrong; the other
    snapshot is right; both can be destroyed, and no state is left.
    """
    with (
        loop_device(folder / "lost-storage-origin", SIZE) as origin,
        filtered(client, origin, way, folder) as disk,
    ):
        for start in range(0, SIZE, MIB):
            write_at(disk.path, start, os.urandom(MIB))
        copy = disk.copy("lost-storage-copy")
        before = storage_state(daemon)
        healthy = disk.snapshot(folder)
        suspect = client.create_snapshot([disk.path], storage=[storage], limit=limit, on_overflow=on_overflow)
        with fio_load(disk.path, f"--rate={rate}", size=str(LOADED)) as load:
            story = LostStorage(daemon, client, disk, copy, healthy, suspect, load)
            wait_until("something is preserved", lambda: story.show().images[0].preserved_bytes > 0)
            yield story
            load.wait_for_round()
            load.check()
        story.expect_healthy()
        disk.destroy(suspect)
        story.overwrite()
        story.expect_healthy()
        disk.destroy(healthy)
        assert storage_state(daemon) == before, storage_state(daemon) - before
        copy.unlink()


def storage_state(daemon: OwnDaemon) -> set[str]:
    """The names of the state files of storages and images."""
    return {name for name in daemon.state() if name.startswith(("storage-", "records-", "image-"))}
