# SPDX-License-Identifier: MIT
"""Where sysfs keeps a block device, and how its attributes are read."""

from __future__ import annotations

import os
from pathlib import Path

from blksnap_ublk.errors import NotFound
from blksnap_ublk.host.number import DeviceNumber

BLOCK_DEVICES = Path("/sys/dev/block")


def directory(number: DeviceNumber) -> Path:
    """The directory of a block device, free of symlinks. Raises NotFound."""
    try:
        return (BLOCK_DEVICES / str(number)).resolve(strict=True)
    except OSError:
        raise NotFound("no such block device", subject=str(number)) from None


def text(directory: Path, name: str) -> str | None:
    """An attribute without its line end; None where this kernel or device does not have it."""
    try:
        return (directory / name).read_text().strip()
    except OSError:
        return None


def integer(directory: Path, name: str, default: int = 0) -> int:
    """A number attribute, or `default` where it is absent or no number."""
    value = text(directory, name)
    try:
        return int(value) if value is not None else default
    except ValueError:
        return default


def number_of(directory: Path) -> DeviceNumber | None:
    """The number of the device that a directory describes; None when it has just gone."""
    value = text(directory, "dev")
    return DeviceNumber.parse(value) if value else None


def numbers_in(directory: Path) -> list[DeviceNumber]:
    """The devices that a directory of links (`slaves`, `holders`, `devices`) names, in order."""
    try:
        links = sorted(directory.iterdir())
    except OSError:
        return []
    return [number for link in links if (number := number_of(link)) is not None]


def all_numbers() -> list[DeviceNumber]:
    """Every block device of this host, partitions included."""
    return sorted(DeviceNumber.parse(name) for name in os.listdir(BLOCK_DEVICES))


def kernel_name(number: DeviceNumber) -> str:
    """The name below `/dev` that the kernel gives (`sda1`, `dm-0`, `ublkb0`). Raises NotFound."""
    where = directory(number)
    for line in (text(where, "uevent") or "").splitlines():
        key, _, value = line.partition("=")
        if key == "DEVNAME":
            return value
    return where.name.replace("!", "/")
