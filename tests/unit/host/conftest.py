# SPDX-License-Identifier: MIT
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.loop_devices import loop_device, mapped, missing_for_loops, mounted, partitioned

MIB = 1 << 20


class Disks:
    """Makes loop devices for one test and takes them down in reverse order."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack

    def disk(self, name: str = "disk", size: int = 16 * MIB, *options: str) -> str:
        return self._stack.enter_context(loop_device(self.directory / name, size, options))

    def on_file(self, image: Path, size: int) -> str:
        return self._stack.enter_context(loop_device(image, size))

    def existing(self, image: Path) -> str:
        return self._stack.enter_context(loop_device(image))

    def on_device(self, device: str) -> str:
        return self._stack.enter_context(loop_device(Path(device)))

    def with_partitions(self, *partitions: tuple[int, int]) -> str:
        """A disk of 16 MiB with its partition nodes; skips where the kernel reads no partition tables."""
        image = partitioned(self.directory / "parted", 16 * MIB, partitions)
        path = self._stack.enter_context(loop_device(image, None, ["--partscan"]))
        if not Path(path + "p1").exists():
            pytest.skip("this kernel makes no partitions of loop devices")
        return path

    def mounted(self, device: str, name: str = "mnt") -> Path:
        return self._stack.enter_context(mounted(device, self.directory / name))

    def linear(self, name: str, device: str, sectors: int) -> str:
        """A dm device above `device`."""
        return self._stack.enter_context(mapped(name, f"0 {sectors} linear {device} 0"))

    def failing(self, name: str, sectors: int) -> str:
        """A dm device whose every I/O fails."""
        return self._stack.enter_context(mapped(name, f"0 {sectors} error"))


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    missing = missing_for_loops()
    if missing:
        pytest.skip(f"loop devices: {missing}")
    with ExitStack() as stack:
        yield Disks(tmp_path, stack)
