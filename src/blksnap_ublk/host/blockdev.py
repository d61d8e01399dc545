# SPDX-License-Identifier: MIT
"""A block device: what it is called, how large it is, and what its queue can do."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from blksnap_ublk.errors import NotFound, UsageError, errno_symbol
from blksnap_ublk.host import sysfs
from blksnap_ublk.host.number import DeviceNumber

SECTOR = 512
_UBLK_NAME = re.compile(r"ublkb([0-9]+)")


@dataclass(frozen=True)
class BlockLimits:
    """The queue limits of a device. Bytes, except what is named `_sectors` (of 512 bytes); 0 = none."""

    logical_block: int
    physical_block: int
    io_min: int
    io_opt: int
    max_sectors: int
    max_hw_sectors: int
    chunk_sectors: int
    max_segments: int
    max_segment_size: int
    virt_boundary_mask: int
    dma_alignment: int
    """A mask: memory of direct I/O must be aligned to one more than it."""
    discard_granularity: int
    discard_alignment: int
    discard_max: int
    write_zeroes_max: int
    rotational: bool
    write_cache: bool
    fua: bool
    stable_writes: bool
    integrity: str | None
    """Format of the protection information (`T10-DIF-TYPE1-CRC` …), None without."""
    inline_crypto: bool
    zoned: str
    """`none`, `host-aware` or `host-managed`."""


@dataclass(frozen=True)
class BlockDevice:
    """A disk, a partition or a virtual block device, as sysfs describes it now."""

    path: str
    """The kernel's own node, `/dev/NAME`; the path that was given where there is no such node."""
    number: DeviceNumber
    name: str
    size: int
    read_only: bool
    disk: DeviceNumber
    """The whole disk of a partition; otherwise the device itself."""
    limits: BlockLimits

    @property
    def is_partition(self) -> bool:
        return self.disk != self.number

    @property
    def ublk_id(self) -> int | None:
        """N for `/dev/ublkbN`; None for everything else, its partitions included."""
        match = _UBLK_NAME.fullmatch(self.name)
        return int(match[1]) if match else None


def device_number(path: str) -> DeviceNumber:
    """The number of the block device at a path or at the end of a symlink. Raises NotFound, UsageError."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise NotFound("no such device", subject=path, errno=errno_symbol(error.errno)) from None
    except ValueError as error:
        raise UsageError(str(error), subject=repr(path)) from None
    if not stat.S_ISBLK(status.st_mode):
        raise UsageError("not a block device", subject=path)
    return DeviceNumber.of(status.st_rdev)


def node_path(number: DeviceNumber) -> str:
    """`/dev/NAME` as the kernel names it. Raises NotFound."""
    return f"/dev/{sysfs.kernel_name(number)}"


def describe(path: str) -> BlockDevice:
    """The block device at a path or at the end of a symlink. Raises NotFound, UsageError."""
    number = device_number(path)
    device = describe_number(number)
    try:
        same = DeviceNumber.of(os.stat(device.path).st_rdev) == number
    except OSError:
        same = False
    if same:
        return device
    return replace(device, path=os.path.realpath(path))


def describe_number(number: DeviceNumber) -> BlockDevice:
    """The block device of a number. Raises NotFound."""
    where = sysfs.directory(number)
    disk = disk_of(number)
    return BlockDevice(
        path=node_path(number),
        number=number,
        name=sysfs.kernel_name(number),
        size=sysfs.integer(where, "size") * SECTOR,
        read_only=sysfs.integer(where, "ro") != 0,
        disk=disk,
        limits=_limits(where, sysfs.directory(disk)),
    )


def disk_of(number: DeviceNumber) -> DeviceNumber:
    """The whole disk of a partition, otherwise the device itself. Raises NotFound."""
    where = sysfs.directory(number)
    if not (where / "partition").exists():
        return number
    return sysfs.number_of(where.parent) or number


def partitions(number: DeviceNumber) -> list[DeviceNumber]:
    """The partitions of a disk in the order of their numbers; empty for anything else. Raises NotFound."""
    where = sysfs.directory(number)
    found = [entry for entry in where.iterdir() if (entry / "partition").is_file()]
    found.sort(key=lambda entry: sysfs.integer(entry, "partition"))
    return [child for entry in found if (child := sysfs.number_of(entry)) is not None]


def _limits(where: Path, disk: Path) -> BlockLimits:
    queue = disk / "queue"
    logical = sysfs.integer(queue, "logical_block_size", SECTOR)
    integrity = sysfs.text(disk, "integrity/format")
    return BlockLimits(
        logical_block=logical,
        physical_block=sysfs.integer(queue, "physical_block_size", logical),
        io_min=sysfs.integer(queue, "minimum_io_size", logical),
        io_opt=sysfs.integer(queue, "optimal_io_size"),
        max_sectors=sysfs.integer(queue, "max_sectors_kb") * 2,
        max_hw_sectors=sysfs.integer(queue, "max_hw_sectors_kb") * 2,
        chunk_sectors=sysfs.integer(queue, "chunk_sectors"),
        max_segments=sysfs.integer(queue, "max_segments"),
        max_segment_size=sysfs.integer(queue, "max_segment_size"),
        virt_boundary_mask=sysfs.integer(queue, "virt_boundary_mask"),
        dma_alignment=sysfs.integer(queue, "dma_alignment", logical - 1),
        discard_granularity=sysfs.integer(queue, "discard_granularity"),
        discard_alignment=sysfs.integer(where, "discard_alignment"),
        discard_max=sysfs.integer(queue, "discard_max_bytes"),
        write_zeroes_max=sysfs.integer(queue, "write_zeroes_max_bytes"),
        rotational=sysfs.integer(queue, "rotational") != 0,
        write_cache=sysfs.text(queue, "write_cache") == "write back",
        fua=sysfs.integer(queue, "fua") != 0,
        stable_writes=sysfs.integer(queue, "stable_writes") != 0,
        integrity=None if integrity in (None, "none") else integrity,
        inline_crypto=(queue / "crypto").is_dir(),
        zoned=sysfs.text(queue, "zoned") or "none",
    )
