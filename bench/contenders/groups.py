# SPDX-License-Identifier: MIT
"""The contenders of each group of cells, set up together, so that all of them can take turns."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.cells import FIRST, READS, READS_BUSY, WRITES, Disk
from bench.contenders.contender import Contender, Ring
from bench.contenders.dm_snapshot import (
    CHUNKS_KIB,
    MARGIN,
    FirstDmOverwrites,
    check_dm_snapshot,
    held_snapshot,
    name_of,
)
from bench.contenders.filtered import FirstOverwrites, WrittenMeanwhile, attach, emptied, take
from bench.contenders.kublk import kublk
from bench.contenders.qemu import FirstQemuOverwrites, check_qemu, copied_before_write
from bench.document import LeftOut
from bench.measure import Job, measure, write_all
from blksnap_ublk.client import Client
from tests.ublk_server import Server


@contextmanager
def contenders(
    group: str, disk: Disk, job: Job, way: str, client: Client
) -> Iterator[tuple[list[Contender], list[LeftOut]]]:
    """Those of a group that can be had here, and those that cannot; the arguments are those of a Ring."""
    with ExitStack() as stack:
        ring = Ring(disk, job, way, client, stack)
        yield GROUPS[group](ring), ring.left_out


def _writes(ring: Ring) -> list[Contender]:
    # All disks before the daemon, which must let them go before they are taken down.
    found = _plain(ring)
    idle, later, storage = (ring.make_disk() for _ in range(3))
    found += [*_later_dm(ring), *_later_qemu(ring)]
    client = ring.stack.enter_context(emptied(ring.client))
    found.append(Contender("idle", attach(client, idle, ring.way)))
    found.append(Contender("later", attach(client, later, ring.way)))
    take(client, found[-1].device, storage)
    write_all(found[-1].device, ring.job.size)
    return found


def _first(ring: Ring) -> list[Contender]:
    def origin() -> str:
        path = ring.make_disk(size=ring.job.spread_size, written=ring.job.size)
        measure("spread-write-4k-qd32", path, ring.job)
        return path

    found: list[Contender] = []
    idle, first, storage = origin(), origin(), ring.make_disk()
    with ring.or_without("dm-snapshot"):
        check_dm_snapshot()
        below, chunks = origin(), ring.make_disk(size=ring.job.spread_size + MARGIN)
        for kib in CHUNKS_KIB:
            found.append(FirstDmOverwrites(name_of(kib), below, chunks=chunks, chunk_kib=kib))
    with ring.or_without("qemu"):
        check_qemu()
        below, target = origin(), ring.make_disk(size=ring.job.spread_size)
        with copied_before_write(below, target):
            found.append(FirstQemuOverwrites("qemu", below, target=target))
    client = ring.stack.enter_context(emptied(ring.client))
    found.insert(0, Contender("idle", attach(client, idle, ring.way)))
    found.insert(1, FirstOverwrites("first", attach(client, first, ring.way), client=client, storage=storage))
    return found


def _reads(ring: Ring) -> list[Contender]:
    found = _plain(ring)
    idle, unwritten, written = (ring.make_disk() for _ in range(3))
    storages = ring.make_disk(), ring.make_disk()
    client = ring.stack.enter_context(emptied(ring.client))
    found.append(Contender("idle", attach(client, idle, ring.way)))
    found += _images(client, ring.job.size, [attach(client, each, ring.way) for each in (unwritten, written)], storages)
    return found


def _reads_busy(ring: Ring) -> list[Contender]:
    origins = [ring.make_disk() for _ in range(3)]
    storages = ring.make_disk(), ring.make_disk()
    client = ring.stack.enter_context(emptied(ring.client))
    idle, *devices = (attach(client, origin, ring.way) for origin in origins)
    images = _images(client, ring.job.size, devices, storages)
    pairs = zip(images, devices, strict=True)
    return [
        WrittenMeanwhile("idle", idle, written=idle),
        *(WrittenMeanwhile(image.name, image.device, written=device) for image, device in pairs),
    ]


def _plain(ring: Ring) -> list[Contender]:
    """The disk itself, and loop servers on such disks."""
    raw, served = ring.make_disk(), ring.make_disk()
    server = ring.stack.enter_context(Server(Path(served), data_path=ring.way))
    ring.stack.callback(server.wait)
    ring.stack.callback(server.signal, signal.SIGTERM)
    found = [Contender("raw", raw), Contender("loop", server.path)]
    # Where the data way is copying, also the kernel's way of copying, which is another one than ours.
    names = {"kublk": server.data_path} | ({"kublk-mapped": "mapped"} if server.data_path == "copy" else {})
    for name, kublk_way in names.items():
        with ring.or_without(name):
            found.append(Contender(name, ring.stack.enter_context(kublk(ring.make_disk(), kublk_way))))
    return found


def _later_dm(ring: Ring) -> Iterator[Contender]:
    with ring.or_without("dm-snapshot"):
        check_dm_snapshot()
        for kib in CHUNKS_KIB:
            origin, chunks = ring.make_disk(), ring.make_disk(size=ring.job.size + MARGIN)
            top = ring.stack.enter_context(held_snapshot(origin, chunks, kib))
            write_all(top, ring.job.size)
            yield Contender(name_of(kib), top)


def _later_qemu(ring: Ring) -> Iterator[Contender]:
    with ring.or_without("qemu"):
        check_qemu()
        top = ring.stack.enter_context(copied_before_write(ring.make_disk(), ring.make_disk()))
        write_all(top, ring.job.size)
        yield Contender("qemu", top)


def _images(client: Client, size: int, devices: list[str], storages: tuple[str, str]) -> list[Contender]:
    """Of the first device nothing is overwritten after the take, of the second everything."""
    (_, image), (_, stored) = (take(client, *each) for each in zip(devices, storages, strict=True))
    write_all(devices[1], size)
    return [Contender("image", image), Contender("image-stored", stored)]


GROUPS: dict[str, Callable[[Ring], list[Contender]]] = {
    WRITES: _writes,
    FIRST: _first,
    READS: _reads,
    READS_BUSY: _reads_busy,
}
