# SPDX-License-Identifier: MIT
"""What first overwrites cost in bytes: read from the origin, written to the storage, by the kernel's own count."""

from __future__ import annotations

from pathlib import Path

from bench.contenders.filtered import emptied
from bench.document import Cost
from bench.measure import Job, measure
from bench.progress import say
from blksnap_ublk.client import Client
from tests.null_block import null_block

SECTOR = 512


def cost_of_first_overwrites(job: Job, client: Client) -> Cost:
    """Overwrites 4 KiB blocks of a disk at random for a while; `client` is of a daemon that serves nothing."""
    say("bytes of first overwrites")
    with (
        null_block(job.size) as origin,
        null_block(job.size) as storage,
        emptied(client),
    ):
        return _cost(client, client.attach(origin, queues=1).device, origin, storage, job)


def _cost(client: Client, device: str, origin: str, storage: str, job: Job) -> Cost:
    snapshot = client.create_snapshot([device], storage=[storage])
    before = _traffic(device), _traffic(origin), _traffic(storage)
    measure("first-randwrite-4k-qd32", device, job)
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
