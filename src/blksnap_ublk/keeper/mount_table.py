# SPDX-License-Identifier: MIT
"""The mounts of this process' mount namespace."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

# They hold no device: a copy of them in another namespace is in nobody's way.
_VIRTUAL = frozenset(
    (
        *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs"),
        *("fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs", "sysfs"),
        *("tmpfs", "tracefs"),
    )
)


@dataclass(frozen=True)
class Mount:
    """`propagates`: mounts and unmounts beneath it go to, or come from, other namespaces."""

    point: str
    kind: str
    propagates: bool

    @property
    def virtual(self) -> bool:
        """Whether it is made of memory only."""
        return self.kind in _VIRTUAL


def mounts() -> list[Mount]:
    """In the order of mountinfo; of several on one point the last lies on top. Raises OSError."""
    return [_parse(line) for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()]


def mount_at(path: Path) -> Mount | None:
    """What is mounted right at `path`. Raises OSError."""
    point = os.path.realpath(path)
    return next((mount for mount in reversed(mounts()) if mount.point == point), None)


def _parse(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    fields = before.split(" ")
    optional = fields[6:]
    propagates = any(each.startswith(("shared:", "master:")) for each in optional)
    return Mount(_unescaped(fields[4]), after.split(" ")[0], propagates)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
