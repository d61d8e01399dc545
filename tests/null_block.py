# SPDX-License-Identifier: MIT
"""Disks in memory by the kernel's null_blk, with any block size, number of queues and time to complete."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIGFS = Path("/sys/kernel/config")
MODULE = Path("/sys/module/null_blk")

_numbers = itertools.count()


def missing_for_null_blocks() -> str | None:
    """Why no such disk can be made here, or None. Loads the module where that is all that is missing."""
    if os.geteuid() != 0:
        return "not root"
    if not CONFIGFS.is_dir():
        return "this kernel has no configfs"
    if not MODULE.exists():
        modprobe = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
        if modprobe is None:
            return "no null_blk, and no modprobe"
        done = subprocess.run([modprobe, "null_blk", "nr_devices=0"], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not MODULE.exists():
            return "this kernel has no null_blk"
    return None


@contextmanager
def null_block(size: int, *, block: int = 512, queues: int = 1, delay_ns: int | None = None) -> Iterator[str]:
    """The node of a disk of `size` bytes (whole MiB) that keeps its data in memory and takes discards.

    `delay_ns`: each request completes by a timer after so many nanoseconds; None: at once.
    """
    assert size % (1 << 20) == 0, "null_blk counts in MiB"
    with _configfs() as top:
        name = f"nullb{os.getpid()}n{next(_numbers)}"
        folder = top / "nullb" / name
        folder.mkdir()
        try:
            settings = {
                "size": size >> 20,
                "blocksize": block,
                "submit_queues": queues,
                "memory_backed": 1,
                "discard": 1,
                "hw_queue_depth": 256,
                "irqmode": 0 if delay_ns is None else 2,
                "completion_nsec": delay_ns or 0,
            }
            for key, value in settings.items():
                (folder / key).write_text(str(value))
            (folder / "power").write_text("1")
            # Kernels name the disk after the folder, older ones by its index.
            by_index = f"/dev/nullb{(folder / 'index').read_text().strip()}"
            yield next(path for path in (f"/dev/{name}", by_index) if os.path.exists(path))
        finally:
            if (folder / "power").read_text().strip() == "1":
                (folder / "power").write_text("0")
            folder.rmdir()


def take_away(path: str) -> None:
    """Removes a disk of `null_block` while it is in use: what comes then fails."""
    name = Path(path).name
    with _configfs() as top:
        folders = [each for each in (top / "nullb").iterdir() if each.is_dir()]
        folder = next(each for each in folders if name in (each.name, f"nullb{(each / 'index').read_text().strip()}"))
        (folder / "power").write_text("0")


@contextmanager
def _configfs() -> Iterator[Path]:
    """Where configfs is mounted; for the moment if it is not."""
    if os.path.ismount(CONFIGFS):
        yield CONFIGFS
        return
    subprocess.run(["mount", "-t", "configfs", "none", str(CONFIGFS)], check=True)
    try:
        yield CONFIGFS
    finally:
        subprocess.run(["umount", str(CONFIGFS)], check=True)
