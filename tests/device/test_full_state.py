# SPDX-License-Identifier: MIT
"""A tmpfs of state files that is full, at every stage: a clear error or success, and never the death of a process.

A touch of a page that such a tmpfs cannot give is SIGBUS.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError
from tests.direct_io import errno_of_read, read_at, write_at
from tests.loop_devices import missing_for_loops
from tests.own_daemon import OwnDaemon, disks, own_daemon

MIB = 1 << 20
PAGE = 4096
DISK = 48 * MIB
STATE = "128M"
FREE = (0, PAGE, 5 * PAGE, 40 * PAGE, 4 * MIB, 17 * MIB, 40 * MIB)
"""Bytes that are left, from nothing to enough."""

missing = missing_for_loops()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


class Watched:
    """A daemon none of whose processes may die."""

    def __init__(self, daemon: OwnDaemon) -> None:
        self._daemon = daemon
        self._ballast = daemon.runtime / "state/ballast"
        self._pids = self._look()

    @contextmanager
    def left(self, free: int) -> Iterator[None]:
        """So many bytes of the tmpfs are free as the block begins."""
        with self._ballast.open("wb") as file:
            # Others take room at the same moment.
            while (wanted := self._free() - free) > 0:
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size + wanted)
        try:
            yield
        finally:
            self._ballast.unlink()
            assert self._look() == self._pids, self._daemon.log()

    def _free(self) -> int:
        status = os.statvfs(self._ballast.parent)
        return status.f_bavail * status.f_bsize

    def _look(self) -> list[int]:
        return [self._daemon.pid(role) for role in ("keeper", "io", "control")]


@pytest.fixture
def small() -> Iterator[OwnDaemon]:
    with own_daemon(("-m", "blksnap_ublk.daemon.main", "--state-size", STATE)) as daemon:
        yield daemon


def _tried(action: Callable[..., object], *arguments: object, **named: object) -> bool:
    """Whether there was room for it; the only error that there may be is that there is none."""
    try:
        action(*arguments, **named)
    except BlksnapError as error:
        if "(ENOSPC)" not in error.message:
            raise
        return False
    return True


def _overwrite(path: str) -> None:
    for start in range(0, DISK, 256 << 10):
        write_at(path, start, os.urandom(256 << 10))


def _expect_truth(client: Client, snapshot: forms.Snapshot, before: list[bytes]) -> None:
    """Its image shows its instant, or errors and says so."""
    image = snapshot.images[0].image
    if client.check_snapshot(snapshot.id).trusted:
        assert [read_at(image, start, MIB) for start in range(0, DISK, MIB)] == before
    else:
        assert errno_of_read(image, 0, MIB) == errno.EIO


def test_a_full_state_directory_kills_nobody(small: OwnDaemon, folder: Path) -> None:
    watched = Watched(small)
    succeeded: dict[str, list[int]] = {"attach": [], "create": [], "add": [], "destroy": [], "detach": []}
    with disks(DISK) as disk, small.client() as client:

        def try_with(free: int, stage: str, action: Callable[..., object], *arguments: object, **named: object) -> None:
            with watched.left(free):
                if _tried(action, *arguments, **named):
                    succeeded[stage].append(free)

        for free in FREE:
            try_with(free, "attach", client.attach, disk.origin)
            device = client.list_devices()[0].device if client.list_devices() else client.attach(disk.origin).device
            _overwrite(device)
            before = [read_at(device, start, MIB) for start in range(0, DISK, MIB)]
            storage = {"storage": [str(folder)], "limit": DISK // 2}
            try_with(free, "create", client.create_snapshot, [device], **storage)
            if not client.list_snapshots():
                client.create_snapshot([device], storage=[str(folder)], limit=DISK // 2)
            (snapshot,) = client.list_snapshots()
            more = folder / "more"
            more.touch()
            os.truncate(more, 2 * DISK)
            try_with(free, "add", client.add_storage, snapshot.id, storage=[str(more)])
            with watched.left(free):
                _overwrite(device)
                _expect_truth(client, snapshot, before)
            try_with(free, "destroy", client.destroy_snapshots, [snapshot.id])
            for held in client.list_snapshots():
                client.destroy_snapshots([held.id])
            try_with(free, "detach", client.detach, device)
            for served in client.list_devices():
                client.detach(served.device)
            more.unlink()
    # The stages were met from both sides.
    assert all(FREE[-1] in found for found in succeeded.values()), succeeded
    assert 0 not in succeeded["attach"] + succeeded["create"], succeeded
