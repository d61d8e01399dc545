# SPDX-License-Identifier: MIT
"""What a block device or a file rests on: partitions, device-mapper, md, loop files, down to the leaves."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from blksnap_ublk.errors import NotFound
from blksnap_ublk.host import blockdev, mounts, sysfs
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.host.syscalls import file_status

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64 = struct.Struct("=QQQQQ")  # device, inode, rdevice, offset, sizelimit, of 232 bytes

Beneath = Mapping[DeviceNumber, Collection[DeviceNumber]]
"""For each block device the devices directly beneath it."""


@dataclass(frozen=True)
class LoopBacking:
    """What a loop device shows. `node` is set for a block device; otherwise it is a file on `filesystem`."""

    path: str
    filesystem: DeviceNumber
    inode: int
    node: DeviceNumber | None


def loop_backing(number: DeviceNumber) -> LoopBacking | None:
    """The backing of a loop device; None for an unbound one and for any other device. Raises NotFound."""
    where = sysfs.directory(number)
    path = sysfs.text(where, "loop/backing_file")
    if path is None:
        return None
    information = bytearray(232)
    try:
        descriptor = os.open(blockdev.node_path(number), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, information)
        finally:
            os.close(descriptor)
    except OSError as error:
        return None if error.errno == errno.ENXIO else _backing_by_path(path)
    device, inode, rdevice, _, _ = _LOOP_INFO64.unpack_from(information)
    # Some kernels give the file system's device as rdevice of a regular file.
    node = DeviceNumber.of(rdevice) if rdevice and rdevice != device else None
    return LoopBacking(path, DeviceNumber.of(device), inode, node)


def devices_beneath_file(target: str | int) -> frozenset[DeviceNumber]:
    """The block devices that hold the file system of a path or a descriptor, an external journal too; empty where there
    are none.

    Raises OSError.
    """
    status = file_status(target)
    if status.filesystem.major:
        return frozenset({status.filesystem}) | mounts.beside(status.filesystem)
    mount = mounts.mount_of(status.mount_id) if status.mount_id is not None else None
    return mounts.devices_of(mount) if mount else frozenset()


def directly_beneath(number: DeviceNumber) -> frozenset[DeviceNumber]:
    """The devices one step down: the disk of a partition, members of dm and md, what holds a loop file."""
    where = sysfs.directory(number)
    found = set(sysfs.numbers_in(where / "slaves"))
    disk = blockdev.disk_of(number)
    if disk != number:
        found.add(disk)
    backing = loop_backing(number)
    if backing and backing.node:
        found.add(backing.node)
    elif backing and backing.filesystem.major:
        found |= {backing.filesystem, *mounts.beside(backing.filesystem)}
    elif backing:
        try:
            if file_status(backing.path).inode == backing.inode:
                found |= devices_beneath_file(backing.path)
        except OSError:
            pass  # deleted, or out of sight of this namespace
    return frozenset(found)


def underlying_devices(number: DeviceNumber) -> frozenset[DeviceNumber]:
    """Every device beneath one, at all levels, without the device itself. Raises NotFound."""
    found: set[DeviceNumber] = set()
    waiting = [number]
    while waiting:
        for below in directly_beneath(waiting.pop()):
            if below not in found and below != number and (sysfs.BLOCK_DEVICES / str(below)).exists():
                found.add(below)
                waiting.append(below)
    return frozenset(found)


def files_beneath(number: DeviceNumber) -> frozenset[tuple[DeviceNumber, int]]:
    """The files, as file system and inode, that hold loop devices of the stack of a device. Raises NotFound."""
    found = set()
    for device in underlying_devices(number) | {number}:
        backing = loop_backing(device)
        if backing is not None and backing.node is None:
            found.add((backing.filesystem, backing.inode))
    return frozenset(found)


def leaves(number: DeviceNumber) -> frozenset[DeviceNumber]:
    """The devices at the bottom of a stack: those with nothing beneath; the device itself if it is one."""
    everything = underlying_devices(number) | {number}
    return frozenset(device for device in everything if not directly_beneath(device) & everything)


def beneath_each() -> dict[DeviceNumber, frozenset[DeviceNumber]]:
    """For every block device of this host, those directly beneath it."""
    found = {}
    for number in sysfs.all_numbers():
        with suppress(NotFound):  # it has just gone
            found[number] = directly_beneath(number)
    return found


def all_beneath(numbers: Iterable[DeviceNumber], beneath: Beneath) -> frozenset[DeviceNumber]:
    """What is a step or more below any of `numbers`; one of them itself only if it rests on another of them."""
    return _reached(numbers, lambda number: beneath.get(number, ()))


def all_above(numbers: Iterable[DeviceNumber], beneath: Beneath) -> frozenset[DeviceNumber]:
    """What is a step or more above any of `numbers`; one of them itself only if it rests on another of them."""
    return _reached(numbers, lambda number: [device for device, below in beneath.items() if number in below])


def devices_above(number: DeviceNumber) -> frozenset[DeviceNumber]:
    """Every device that rests on one, at all levels: its partitions, dm, md, loop devices on its files."""
    return all_above([number], beneath_each()) - {number}


def mounts_above(number: DeviceNumber) -> list[mounts.Mount]:
    """The mounts of all namespaces that sit on a device, its partitions or stacks above it."""
    wanted = devices_above(number) | {number}
    return [mount for mount in mounts.all_mounts() if mounts.devices_of(mount) & wanted]


def _reached(
    numbers: Iterable[DeviceNumber], step: Callable[[DeviceNumber], Iterable[DeviceNumber]]
) -> frozenset[DeviceNumber]:
    found: set[DeviceNumber] = set()
    waiting = list(numbers)
    while waiting:
        reached = set(step(waiting.pop())) - found
        found |= reached
        waiting += reached
    return frozenset(found)


def _backing_by_path(path: str) -> LoopBacking | None:
    try:
        status = file_status(path)
    except OSError:
        return None
    return LoopBacking(path, status.filesystem, status.inode, status.node if stat.S_ISBLK(status.mode) else None)
