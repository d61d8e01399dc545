# SPDX-License-Identifier: MIT
"""What names a block device over reboots: its own numbers where it has any, and otherwise its node."""

from __future__ import annotations

from pathlib import Path

from blksnap_ublk.host import sysfs
from blksnap_ublk.host.blockdev import disk_of, node_path
from blksnap_ublk.host.number import DeviceNumber

_ATTRIBUTES = ("wwid", "device/wwid", "serial", "device/serial", "dm/uuid", "md/uuid", "loop/backing_file")


def identity(number: DeviceNumber) -> str:
    """A line of text that another device, a copy of this one included, hardly ever has. Raises NotFound.

    Where the device has no number of its own it is the name of its node, which another device may get.
    """
    disk = disk_of(number)
    where = sysfs.directory(disk)
    found = [f"{name}={value}" for name in _ATTRIBUTES if (value := _clean(where, name))]
    if not found:
        found = [f"node={node_path(disk)}"]
    if disk != number:
        partition = sysfs.directory(number)
        found.append(f"partition={sysfs.integer(partition, 'partition')} start={sysfs.integer(partition, 'start')}")
    return " ".join(found)


def _clean(where: Path, name: str) -> str:
    return " ".join((sysfs.text(where, name) or "").split())
