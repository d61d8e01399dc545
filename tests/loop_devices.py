# SPDX-License-Identifier: MIT
"""Loop devices, file systems on them and dm devices above them, for tests; each taken down at the end of its `with`."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def missing_for_loops() -> str | None:
    """Why no loop device can be made and mounted here, or None."""
    if os.geteuid() != 0:
        return "not root"
    if not Path("/dev/loop-control").exists():
        return "no /dev/loop-control"
    return next((f"no {tool}" for tool in ("losetup", "mount", "mkfs.ext4") if not shutil.which(tool)), None)


def run(*command: str) -> str:
    """Runs a command and returns its standard output; its messages are part of the exception when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


@contextmanager
def loop_device(image: Path, size: int | None = None, options: Sequence[str] = ()) -> Iterator[str]:
    """`/dev/loopN` over `image`, which is made sparse with `size` bytes if a size is given."""
    if size is not None:
        with image.open("wb") as file:
            file.truncate(size)
    path = run("losetup", "--find", "--show", *options, str(image))
    try:
        yield path
    finally:
        run("losetup", "--detach", path)


@contextmanager
def mounted(
    device: str, directory: Path, kind: str = "ext4", mkfs: Sequence[str] = (), options: str = "rw"
) -> Iterator[Path]:
    """A fresh file system on `device`, mounted at `directory`, which is created."""
    run(f"mkfs.{kind}", "-qf" if kind == "xfs" else "-q", *mkfs, device)
    directory.mkdir(exist_ok=True)
    run("mount", "-t", kind, "-o", options, device, str(directory))
    try:
        yield directory
    finally:
        # A process that is just ending may have it open for another moment.
        end = time.monotonic() + 30
        while subprocess.run(["umount", str(directory)], capture_output=True).returncode and time.monotonic() < end:
            time.sleep(0.05)


@contextmanager
def mapped(name: str, table: str) -> Iterator[str]:
    """A dm device with a table of one line; its `/dev/dm-N`."""
    run("dmsetup", "create", name, "--table", table)
    try:
        yield f"/dev/dm-{run('dmsetup', 'info', '-c', '--noheadings', '-o', 'minor', name)}"
    finally:
        run("dmsetup", "remove", "--retry", name)


def partitioned(image: Path, size: int, partitions: Sequence[tuple[int, int]]) -> Path:
    """Makes an image with an MBR of up to four (first sector, sectors) partitions; for `losetup --partscan`."""
    table = b"".join(struct.pack("<8B2I", 0, 0, 0, 0, 0x83, 0, 0, 0, *each) for each in partitions).ljust(64, b"\0")
    with image.open("wb") as file:
        file.truncate(size)
        file.seek(446)
        file.write(table + b"\x55\xaa")
    return image


@contextmanager
def process(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed its first line; it ends when its standard input is closed."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline(), "the process ended at once"
        yield child
    finally:
        child.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)
        child.kill()
        child.wait()
        child.stdout.close()
