# SPDX-License-Identifier: MIT
"""What first overwrites cost in bytes: read from the origin, written to the storage, by the kernel's own count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.measure import Job, measure
from blksnap_ublk.client import Client
from tests.null_block import null_block
from tests.own_daemon import own_daemon

SECTOR = 512


@dataclass(frozen=True)
class Cost:
    """Bytes, for `writes` random writes of 4 KiB that overwrite a block for the first time each."""

    writes: int
    origin_read: int
    origin_written: int
    storage_read: int
    storage_written: int
    used: int
    """Of the storage, as `snapshot show` tells."""


def cost_of_first_overwrites(size: int) -> Cost:
    """Overwrites 4 KiB blocks of a disk of `size` bytes at random for a while."""
    with (
        null_block(size) as origin,
        null_block(size) as storage,
        own_daemon() as daemon,
        daemon.client() as client,
    ):
        return _cost(client, client.attach(origin, queues=1).device, origin, storage, size)


def _cost(client: Client, device: str, origin: str, storage: str, size: int) -> Cost:
    snapshot = client.create_snapshot([device], storage=[storage])
    before = _traffic(device), _traffic(origin), _traffic(storage)
    measure("first-randwrite-4k-qd32", device, Job("libaio", 2.0, size))
    after = _traffic(device), _traffic(origin), _traffic(storage)
    (_, written), (origin_read, origin_written), (storage_read, storage_written) = (
        (new[0] - old[0], new[1] - old[1]) for old, new in zip(before, after, strict=True)
    )
    used = client.show_snapshot(snapshot.id).storage.used
    return Cost(written // 4096, origin_read, origin_written, storage_read, storage_written, used)


def _traffic(disk: str) -> tuple[int, int]:
    """Bytes that a disk has read and written so far."""
    fields = (Path("/sys/block") / Path(disk).name / "stat").read_text().split()
    return int(fields[2]) * SECTOR, int(fields[6]) * SECTOR
