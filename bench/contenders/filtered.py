# SPDX-License-Identifier: MIT
"""Filtered devices as contenders: without a snapshot, with one, and images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.contenders.contender import Contender
from bench.document import Speed
from bench.measure import Job, measure, written_meanwhile
from blksnap_ublk.client import Client


def attach(client: Client, origin: str, way: str) -> str:
    """The filtered device of an origin; `way` is the data way, or `auto`."""
    if way == "copy":
        (Path("/sys/block") / Path(origin).name / "queue/stable_writes").write_text("1")
    # One queue, as the loop servers have.
    return client.attach(origin, queues=1).device


@contextmanager
def emptied(client: Client) -> Iterator[Client]:
    """At its end all snapshots and filtered devices are gone, and so are the claims on disks."""
    try:
        yield client
    finally:
        for snapshot in client.list_snapshots():
            client.destroy_snapshots([snapshot.id], force=True)
        for device in client.list_devices():
            client.detach(device.device, force=True)


def take(client: Client, device: str, storage: str) -> tuple[str, str]:
    """A snapshot of one device: its id, and its image."""
    snapshot = client.create_snapshot([device], storage=[storage])
    return snapshot.id, snapshot.images[0].image


@dataclass
class FirstOverwrites(Contender):
    """A filtered device with a snapshot that is taken anew before each run: every write preserves."""

    client: Client = field(kw_only=True)
    storage: str = field(kw_only=True)

    @property
    def steady(self) -> bool:
        """It is not."""
        return False

    def run(self, cell: str, job: Job) -> Speed:
        """A run of a job that writes no block twice."""
        snapshot, _ = take(self.client, self.device, self.storage)
        try:
            speed = measure(cell, self.device, job)
            state = self.client.show_snapshot(snapshot).state
            if state != "active":
                raise RuntimeError(f"{cell}: the snapshot is {state}: nothing was measured")
            return speed
        finally:
            self.client.destroy_snapshots([snapshot])


@dataclass
class WrittenMeanwhile(Contender):
    """A device that is read while `written` is written to."""

    written: str = field(kw_only=True)

    @property
    def steady(self) -> bool:
        """It is not."""
        return False

    def run(self, cell: str, job: Job) -> Speed:
        """One run of a cell beside the writer."""
        with written_meanwhile(self.written, job):
            return measure(cell, self.device, job)
