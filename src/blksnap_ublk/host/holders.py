# SPDX-License-Identifier: MIT
"""Who has a block device or a file: mounts, swap, devices stacked on it, processes."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk.errors import Busy, NotFound
from blksnap_ublk.host import blockdev, mounts, stack, swap, sysfs
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.host.syscalls import file_status

_LOOP_MAJOR = 7
_NAMED = 4  # more holders than these are counted only


@dataclass(frozen=True)
class Opener:
    """A process that has a block device open, exclusively or not."""

    pid: int
    command: str
    device: DeviceNumber
    node: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


@dataclass(frozen=True)
class Holder:
    """Something that claims a device, in words, and what ends the claim."""

    text: str
    advice: str


def openers(number: DeviceNumber, ignore: Collection[int] = ()) -> list[Opener]:
    """The processes that have a device or one of its partitions open, each once for a device.

    Descriptors that only an io_uring table holds are invisible; pids in `ignore` are left out. Raises NotFound.
    """
    nodes = {device: blockdev.node_path(device) for device in (number, *blockdev.partitions(number))}
    found: dict[tuple[int, DeviceNumber], Opener] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid in ignore:
            continue
        for device in _open_devices(pid) & nodes.keys():
            found[pid, device] = Opener(pid, command_of(pid), device, nodes[device])
    return list(found.values())


def claims(number: DeviceNumber) -> list[Holder]:
    """What the kernel itself claims a device, its partitions or its disk for: mounts, swap, stacked devices."""
    related = _related(number)
    found = [
        Holder(str(mount) + _on(mounts.devices_of(mount), number), "unmount it first")
        for mount in mounts.mounts_directly_on(related)
    ]
    found += [
        Holder("swap" + _on(frozenset({area.device}), number), f"swapoff {area.path} first")
        for area in swap.swap_areas()
        if area.inode is None and area.device in related
    ]
    for device in sorted(related):
        for above in sysfs.numbers_in(sysfs.directory(device) / "holders"):
            found.append(Holder(f"device {_title(above)}" + _on(frozenset({device}), number), "remove it first"))
    for device in loops_on(number):
        found.append(Holder(f"device {_title(device)}", f"losetup -d {blockdev.node_path(device)} first"))
    return found


def loops_on(number: DeviceNumber) -> list[DeviceNumber]:
    """The loop devices directly on a device, its partitions or its disk. Raises NotFound."""
    related = _related(number)
    found = []
    for device in sysfs.all_numbers():
        with suppress(NotFound):  # it has just gone
            backing = stack.loop_backing(device) if device.major == _LOOP_MAJOR else None
            if backing and backing.node in related:
                found.append(device)
    return found


def busy_error(path: str, number: DeviceNumber) -> Busy:
    """`/dev/sdb: in use by mount /data (EBUSY); unmount it first`, for a device that could not be claimed."""
    found = claims(number)
    if not found:
        processes = {opener.pid: opener for device in _related(number) for opener in openers(device)}
        found = [Holder(str(opener), "end it first") for opener in processes.values()]
    if not found:
        found = [Holder("the kernel, perhaps a file system that was unmounted lazily", "end its last users first")]
    texts = list(dict.fromkeys(holder.text for holder in found))
    rest = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    named = ", ".join(texts[:_NAMED])
    return Busy(f"in use by {named}{rest}", subject=path, errno="EBUSY", advice=found[0].advice)


def lock_holders(filesystem: DeviceNumber, inode: int) -> list[str]:
    """The processes that hold a lock on a file, as `process PID (COMMAND)`."""
    wanted = f"{filesystem.major:02x}:{filesystem.minor:02x}:{inode}"
    pids = []
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.replace("->", "").split()
        if len(fields) >= 6 and fields[5] == wanted:
            pids.append(int(fields[4]))
    return [f"process {pid} ({command_of(pid)})" for pid in dict.fromkeys(pids)]


def command_of(pid: int) -> str:
    """The short name of a process; `?` when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def _related(number: DeviceNumber) -> frozenset[DeviceNumber]:
    """A claim of a disk excludes claims of its partitions and the other way round."""
    return frozenset({number, blockdev.disk_of(number), *blockdev.partitions(number)})


def _on(devices: frozenset[DeviceNumber], number: DeviceNumber) -> str:
    if number in devices:
        return ""
    return " on " + ", ".join(blockdev.node_path(device) for device in sorted(devices))


def _title(number: DeviceNumber) -> str:
    name = sysfs.text(sysfs.directory(number), "dm/name")
    return f"{blockdev.node_path(number)} ({name})" if name else blockdev.node_path(number)


def _open_devices(pid: int) -> set[DeviceNumber]:
    found: set[DeviceNumber] = set()
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return found
    for name in names:
        link = f"/proc/{pid}/fd/{name}"
        try:
            if not os.readlink(link).startswith("/"):
                continue
            status = file_status(link, cached=True)
        except OSError:
            continue
        if stat.S_ISBLK(status.mode):
            found.add(status.node)
    return found
