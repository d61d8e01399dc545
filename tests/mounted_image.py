# SPDX-License-Identifier: MIT
"""File systems in images, mounted to be written to, and checked."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.loop_devices import run
from tests.own_daemon import wait_until


@contextmanager
def mounted_image(kind: str, image: str, point: Path) -> Iterator[Path]:
    """The file system in an image, mounted at `point` beside the one it is an image of; its journal is replayed."""
    point.mkdir(exist_ok=True)
    run("mount", "-t", kind, "-o", "nouuid" if kind == "xfs" else "rw", image, str(point))
    try:
        yield point
    finally:
        wait_until(
            f"{point} is unmounted", lambda: subprocess.run(["umount", str(point)], capture_output=True).returncode == 0
        )


def check(kind: str, device: str) -> None:
    """The file system check finds nothing wrong with what is not mounted."""
    run(*(("xfs_repair", "-n") if kind == "xfs" else ("e2fsck", "-fn")), device)
