# SPDX-License-Identifier: MIT
"""The two disks of the demo, and all else that has to be gone at its end."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo.commands import run
from demo.narration import tell

STORAGE_SHARE = 0.4
"""Part of the second disk that each of the two storage files takes."""


@dataclass(frozen=True)
class Bench:
    """What the scenario works on. `origin` and `other` are block devices of `size` bytes; `other` is mounted."""

    directory: Path
    size: int
    origin: str
    other: str
    storage: list[Path]

    @property
    def mount_point(self) -> Path:
        """Where the file system of the filtered device is mounted."""
        return self.directory / "data"

    @property
    def image_mount_point(self) -> Path:
        """Where images are mounted."""
        return self.directory / "image"

    @property
    def copy(self) -> Path:
        """The backup."""
        return self.directory / "backup.img"


@contextmanager
def bench(size: int) -> Iterator[Bench]:
    """Two loop devices of `size` bytes in a directory of our own; taken down on every path."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blksnap-demo-")))
        if memory_available() > 5 * size:
            run("mount", "-t", "tmpfs", "-o", f"size={4 * size},mode=0700", "blksnap-demo", str(directory))
            stack.callback(_try, "umount", str(directory))
        origin = stack.enter_context(_loop(directory / "disk1", size))
        other = stack.enter_context(_loop(directory / "disk2", size))
        tell(f"two disks of {size >> 20} MiB: {origin} and {other}")
        run("mkfs.ext4", "-q", other)
        storage_directory = directory / "storage"
        for name in ("storage", "data", "image"):
            (directory / name).mkdir()
        run("mount", other, str(storage_directory))
        stack.callback(_try, "umount", str(storage_directory))
        files = [storage_directory / "one", storage_directory / "two"]
        for file in files:
            with file.open("wb") as opened:
                os.fchmod(opened.fileno(), 0o600)
                os.posix_fallocate(opened.fileno(), 0, int(size * STORAGE_SHARE) >> 20 << 20)
        yield Bench(directory, size, origin, other, files)


@contextmanager
def mounted(device: str, point: Path, *options: str) -> Iterator[None]:
    """A mounted file system."""
    run("mount", *options, device, str(point))
    try:
        yield
    finally:
        _unmount(point)


def is_mounted(point: Path) -> bool:
    """Whether anything is mounted there."""
    return os.path.ismount(point)


def _unmount(point: Path) -> None:
    if is_mounted(point):
        run("umount", str(point))


@contextmanager
def _loop(file: Path, size: int) -> Iterator[str]:
    with file.open("wb") as opened:
        opened.truncate(size)
    device = run("losetup", "--find", "--show", str(file))
    try:
        yield device
    finally:
        _try("losetup", "--detach", device)


def _try(*command: str) -> None:
    """For cleaning up: whatever went wrong before, the rest is cleaned up as well."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        tell(f"`{' '.join(command)}`: {done.stderr.strip()}")


def memory_available() -> int:
    """Bytes that can be taken into use."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
