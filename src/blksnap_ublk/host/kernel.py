# SPDX-License-Identifier: MIT
"""The running kernel: its version, and what is known to go wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class KernelVersion(NamedTuple):
    major: int
    minor: int

    @classmethod
    def parse(cls, release: str) -> KernelVersion:
        """From `uname -r`. Raises ValueError."""
        match = re.match(r"([0-9]+)\.([0-9]+)", release)
        if match is None:
            raise ValueError(f"not a kernel release: {release!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


OLDEST = KernelVersion(6, 5)
"""The first one with USER_COPY, without which no device can be served."""
ZERO_COPY = KernelVersion(6, 16)


@dataclass(frozen=True)
class Trap:
    """Something to know about the kernels from `first` on and before `fixed`; distributions may have fixed it."""

    first: KernelVersion
    fixed: KernelVersion
    text: str
    advice: str


TRAPS = (
    Trap(
        KernelVersion(6, 3), KernelVersion(6, 15),
        "the ublk_drv parameter ublks_max (64 by default) limits the devices of all users together",
        "load ublk_drv with a larger ublks_max if more devices are to be served",
    ),
    Trap(
        OLDEST, KernelVersion(6, 12),
        "a discard through io_uring is not possible, so none is offered",
        "use 6.12 or later if the file system shall trim its disk",
    ),
    Trap(
        OLDEST, KernelVersion(7, 0),
        "the partition scan of a device that starts can block its control commands when the server dies meanwhile"
        " (CVE-2025-68823)",
        "keep the kernel up to date; later releases of this series may have the fix",
    ),
    Trap(
        KernelVersion(6, 16), KernelVersion(7, 0),
        "UPDATE_SIZE of a device that has no disk yet can crash the kernel",
        "keep the kernel up to date; later releases of this series may have the fix",
    ),
)  # fmt: skip


def traps_of(version: KernelVersion) -> list[Trap]:
    """The traps that a kernel of this version may have."""
    return [trap for trap in TRAPS if trap.first <= version < trap.fixed]
