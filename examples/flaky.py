# SPDX-License-Identifier: MIT
"""A disk over a file that is slow and fails: to see what a program makes of it.

    python flaky.py disk.img --delay 5 --jitter 20 --errors 0.001 --bad 1048576+4096

Each request waits `delay` milliseconds and a random part of `jitter`; a share `errors` of all requests fails with EIO,
and so does each one that touches a bad range (bytes, START+LENGTH). Ctrl-C removes the disk, the file keeps the data.
"""

import errno
import os
import random
import time
from pathlib import Path
from typing import Annotated

import typer

from blksnap_ublk import ublk


class Flaky(ublk.PyTarget):
    """Reads and writes a file, not always."""

    workers = 16  # requests that wait at the same time

    def __init__(
        self, path: Path, delay: float, jitter: float, errors: float, bad: list[tuple[int, int]], seed: int
    ) -> None:
        """`delay` and `jitter` in seconds; `bad`: (start, end) in bytes."""
        self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size = os.fstat(self.file).st_size // self.block * self.block
        self.delay, self.jitter, self.errors, self.bad = delay, jitter, errors, bad
        self.random = random.Random(seed)

    def suffer(self, start: int, length: int) -> None:
        time.sleep(self.delay + self.jitter * self.random.random())
        hit = any(start < end and begin < start + length for begin, end in self.bad)
        if hit or self.random.random() < self.errors:
            raise OSError(errno.EIO, "injected")

    def read(self, offset: int, buf: memoryview) -> None:
        self.suffer(offset, len(buf))
        while buf:
            count = os.preadv(self.file, [buf], offset)
            if not count:
                raise OSError(errno.EIO, "the file has become shorter")
            buf, offset = buf[count:], offset + count

    def write(self, offset: int, buf: memoryview) -> None:
        self.suffer(offset, len(buf))
        while buf:
            count = os.pwritev(self.file, [buf], offset)
            buf, offset = buf[count:], offset + count

    def flush(self) -> None:
        self.suffer(0, 0)
        os.fdatasync(self.file)


def parse_range(text: str) -> tuple[int, int]:
    try:
        start, length = (int(part) for part in text.split("+"))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not START+LENGTH in bytes") from None
    return start, start + length


def main(
    path: Annotated[Path, typer.Argument(help="file that keeps the data", exists=True, dir_okay=False)],
    delay: Annotated[float, typer.Option(help="milliseconds that each request takes longer", min=0)] = 0,
    jitter: Annotated[float, typer.Option(help="random milliseconds on top, at most", min=0)] = 0,
    errors: Annotated[float, typer.Option(help="share of the requests that fail", min=0, max=1)] = 0,
    bad: Annotated[list[str] | None, typer.Option(help="START+LENGTH in bytes that always fails; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="makes the same choices again")] = 0,
) -> None:
    """Serve FILE as a disk with injected delays and errors."""
    target = Flaky(path, delay / 1000, jitter / 1000, errors, [parse_range(text) for text in bad or []], seed)
    with ublk.Device.add(target) as device:
        typer.echo(device.path)
        device.serve()


if __name__ == "__main__":
    typer.run(main)
