# SPDX-License-Identifier: MIT
"""What all contenders are: a name, and a device on which a job runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from bench.cells import Disk
from bench.document import LeftOut, Speed
from bench.measure import Job, measure, write_all
from blksnap_ublk.client import Client
from tests.null_block import null_block


class Unavailable(Exception):
    """A contender cannot be had here; the text says why."""


@dataclass
class Contender:
    """A device under test, which is as it is from run to run."""

    name: str
    device: str

    @property
    def steady(self) -> bool:
        """Whether nothing is to be done between its runs."""
        return True

    def run(self, cell: str, job: Job) -> Speed:
        """One run of a cell."""
        return measure(cell, self.device, job)


@dataclass
class Ring:
    """What is being set up: `stack` takes all of it down again, the latest first.

    `client` is of a daemon that serves nothing; `way` the data way of filtered devices and of our loop server, or
    `auto`.
    """

    disk: Disk
    job: Job
    way: str
    client: Client
    stack: ExitStack
    left_out: list[LeftOut] = field(default_factory=list)

    def make_disk(self, *, size: int | None = None, written: int | None = None) -> str:
        """The path of a disk of the kind in question, of which the first `written` bytes (all) were written once."""
        size = self.job.size if size is None else size
        path = self.stack.enter_context(null_block(size, delay_ns=self.disk.delay_ns))
        write_all(path, size if written is None else written)
        return path

    @contextmanager
    def or_without(self, what: str) -> Iterator[None]:
        """Notes down why `what` is left out when the block raises Unavailable."""
        try:
            yield
        except Unavailable as error:
            self.left_out.append(LeftOut(what, str(error)))
