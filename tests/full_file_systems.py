# SPDX-License-Identifier: MIT
"""File systems that are small, and file systems that are full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.loop_devices import run

MIB = 1 << 20
UNIT = 4096


def fill_file_system(directory: Path, name: str = "ballast") -> None:
    """Takes all the space that is left."""
    with (directory / name).open("wb") as file:
        piece, size = MIB, 0
        while piece >= UNIT:
            try:
                os.posix_fallocate(file.fileno(), size, piece)
                size += piece
            except OSError:
                piece //= 2


@contextmanager
def tmpfs(directory: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes, mounted at `directory`, which is created."""
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory))
    try:
        yield directory
    finally:
        run("umount", str(directory))
