# SPDX-License-Identifier: MIT
"""What the kernel has counted of the writes to a device since it appeared."""

from __future__ import annotations

from pathlib import Path

import msgspec

from blksnap_ublk.host import sysfs
from blksnap_ublk.host.blockdev import disk_of
from blksnap_ublk.host.number import DeviceNumber

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Counters(msgspec.Struct, frozen=True):
    """Comparable within one boot and one appearance of the disk only: `boot`, `disk` (its diskseq).

    `written`: sectors written and sectors discarded. Requests are no sign: a flush may count as one that writes.
    """

    boot: str
    disk: int
    written: tuple[int, int]

    def comparable(self, other: Counters) -> bool:
        """Whether both count from the same moment."""
        return (self.boot, self.disk) == (other.boot, other.disk)


def read(number: DeviceNumber) -> Counters | None:
    """The counters of a device (of a partition: its own); None where the kernel does not count. Raises NotFound."""
    where, disk = sysfs.directory(number), sysfs.directory(disk_of(number))
    sequence = sysfs.integer(disk, "diskseq")
    fields = (sysfs.text(where, "stat") or "").split()
    if not sequence or sysfs.integer(disk / "queue", "iostats") != 1 or len(fields) < 15:
        return None
    written = (int(fields[6]), int(fields[13]))
    return Counters(_BOOT.read_text().strip(), sequence, written)
