# SPDX-License-Identifier: MIT
"""Partitions of disks, for tests."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_partitions(disk: str, count: int = 2, mebibytes: int = 8) -> None:
    """A GPT with `count` partitions of that size; the kernel is not told."""
    table = "label: gpt\n" + "".join(f"size={mebibytes}MiB, name=part-{n}\n" for n in range(1, count + 1))
    command = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe", "never", disk]
    done = subprocess.run(command, input=table, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def partitions_of(disk: str) -> list[str]:
    """The nodes of its partitions that the kernel shows."""
    name = Path(disk).name
    return sorted(f"/dev/{path.parent.name}" for path in Path("/sys/block").glob(f"{name}/*/partition"))
