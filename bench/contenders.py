# SPDX-License-Identifier: MIT
"""What is compared: each has a disk of its own of the same kind, and is ready to be measured at any time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.measure import Job, Speed, measure, write_all
from blksnap_ublk.client import Client
from tests.null_block import null_block
from tests.own_daemon import own_daemon
from tests.ublk_server import Server


@dataclass
class Contender:
    """A device under test. `writes`, `reads`: whether cells that do so make sense for it."""

    name: str
    device: str
    writes: bool = True
    reads: bool = True

    def run(self, cell: str, job: Job) -> Speed:
        """One run of a cell."""
        return measure(cell, self.device, job)


@dataclass
class FirstOverwrites(Contender):
    """A filtered device with a snapshot that is taken anew before each run: every write preserves."""

    client: Client = field(kw_only=True)
    storage: str = field(kw_only=True)
    reads: bool = False

    def run(self, cell: str, job: Job) -> Speed:
        """A run that writes no block twice."""
        snapshot = self.client.create_snapshot([self.device], storage=[self.storage])
        try:
            speed = measure(f"first-{cell}", self.device, job)
            state = self.client.show_snapshot(snapshot.id).state
            if state != "active":
                raise RuntimeError(f"{cell}: the snapshot is {state}: nothing was measured")
            return speed
        finally:
            self.client.destroy_snapshots([snapshot.id])


@dataclass(frozen=True)
class Disk:
    """A kind of disk: `delay_ns` until a request completes, None for at once."""

    name: str
    delay_ns: int | None


RAM = Disk("RAM disk", None)
SLOW = Disk("100 µs disk", 100_000)


@contextmanager
def contenders(disk: Disk, size: int, way: str) -> Iterator[list[Contender]]:
    """All contenders, each on a disk of `size` bytes of its own; `way` is the data way, or `auto`."""
    with ExitStack() as stack:

        def make() -> str:
            path = stack.enter_context(null_block(size, delay_ns=disk.delay_ns))
            write_all(path, size)
            return path

        # All disks before the daemon, which must let them go before they are taken down.
        raw, served = make(), make()
        origins = [make() for _ in range(4)]
        first_storage, later_storage, image_storage = make(), make(), make()
        server = stack.enter_context(Server(Path(served), data_path=way))
        stack.callback(server.wait)
        stack.callback(server.signal, signal.SIGTERM)
        client = stack.enter_context(stack.enter_context(own_daemon()).client())

        def attach(origin: str) -> str:
            if way == "copy":
                (Path("/sys/block") / Path(origin).name / "queue/stable_writes").write_text("1")
            # One queue, as the loop device has.
            return client.attach(origin, queues=1).device

        def image(device: str, storage: str) -> str:
            return client.create_snapshot([device], storage=[storage]).images[0].image

        idle, first, later, unwritten = map(attach, origins)
        later_image = image(later, later_storage)
        write_all(later, size)
        yield [
            Contender("raw", raw),
            Contender("loop", server.path),
            Contender("idle", idle),
            FirstOverwrites("first", first, client=client, storage=first_storage),
            Contender("later", later, reads=False),
            Contender("image", image(unwritten, image_storage), writes=False),
            Contender("image-stored", later_image, writes=False),
        ]
