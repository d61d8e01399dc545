# SPDX-License-Identifier: MIT
"""Where kernels and images are kept, and making each of them once."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNUSED_SECONDS = 14 * 24 * 3600


def directory() -> Path:
    """The cache directory, made if it does not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "blksnap-ublk"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time makes what `name` stands for."""
    with (directory() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_unused(pattern: str) -> None:
    """Removes the files that match and were not used for two weeks (using one sets its time)."""
    for path in directory().glob(pattern):
        if path.stat().st_mtime < time.time() - UNUSED_SECONDS:
            path.unlink(missing_ok=True)
