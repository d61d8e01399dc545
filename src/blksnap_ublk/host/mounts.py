# SPDX-License-Identifier: MIT
"""Mounted file systems, in every mount namespace, and the block devices beneath them."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk.host import journal, sysfs
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.host.syscalls import file_status

_ESCAPE = re.compile(r"\\([0-7]{3})")
_BTRFS = Path("/sys/fs/btrfs")
_DRIVERS = [Path("/sys/fs") / name for name in ("ext4", "xfs", "f2fs")]
_BTRFS_IOC_FS_INFO = 0x8400941F


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo. `pid` is a process in whose mount namespace it is seen, None for our own."""

    mount_id: int
    device: DeviceNumber
    """Major 0 where the file system has a number of its own (btrfs, overlay, tmpfs …)."""
    root: str
    point: str
    filesystem: str
    source: str
    super_options: str
    read_only: bool
    pid: int | None

    @property
    def file_system_read_only(self) -> bool:
        """The file system itself, through every mount of it."""
        return "ro" in self.super_options.split(",")

    @property
    def path(self) -> str:
        """The mount point as this process can open it."""
        return f"/proc/{self.pid}/root{self.point}" if self.pid else self.point

    def __str__(self) -> str:
        return f"mount {self.point}" + (f" (in the mount namespace of process {self.pid})" if self.pid else "")


def unescape(text: str) -> str:
    """Undoes the `\\040` that the kernel writes for blanks in paths."""
    return os.fsdecode(_ESCAPE.sub(lambda m: chr(int(m[1], 8)), os.fsencode(text).decode("latin-1")).encode("latin-1"))


def parse_mountinfo(text: str, pid: int | None = None) -> list[Mount]:
    """The mounts of one `/proc/PID/mountinfo`; lines of an unknown form are left out."""
    found = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if not separator or len(fields) < 6 or len(rest) < 3:
            continue
        found.append(
            Mount(
                mount_id=int(fields[0]),
                device=DeviceNumber.parse(fields[2]),
                root=unescape(fields[3]),
                point=unescape(fields[4]),
                filesystem=rest[0],
                source=unescape(rest[1]),
                super_options=rest[2],
                read_only="ro" in fields[5].split(",") or "ro" in rest[2].split(","),
                pid=pid,
            )
        )
    return found


def own_mounts() -> list[Mount]:
    """The mounts of this process's namespace."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def all_mounts() -> list[Mount]:
    """The mounts of every mount namespace that has a process, our own first, each namespace once."""
    found = own_mounts()
    seen = {os.readlink("/proc/self/ns/mnt")}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in seen:
                text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
                found += parse_mountinfo(text, pid)
                seen.add(namespace)
        except OSError:  # ended meanwhile
            continue
    return found


def mount_of(mount_id: int) -> Mount | None:
    """The mount of this namespace with an id (`stx_mnt_id`)."""
    return next((mount for mount in own_mounts() if mount.mount_id == mount_id), None)


def devices_of(mount: Mount) -> frozenset[DeviceNumber]:
    """The block devices that a mounted file system lies on; empty where it has none or does not tell."""
    if mount.device.major:
        return frozenset({mount.device}) | journal.external(mount.device) | _xfs_devices(mount)
    if mount.filesystem == "btrfs":
        return _btrfs_devices(mount)
    if mount.filesystem == "overlay":
        return frozenset(_overlay_devices(mount))
    return frozenset(_block_nodes(mount.source.split(":")))  # bcachefs names all members, with colons


def beside(number: DeviceNumber) -> frozenset[DeviceNumber]:
    """The other block devices that the file system on a device writes to when it is written to: journal, log, realtime.

    For those mounted in this namespace; nothing is read from any device.
    """
    same = [mount for mount in own_mounts() if mount.device == number and mount.filesystem == "xfs"]
    return journal.external(number).union(*map(_xfs_devices, same))


def mounts_directly_on(numbers: frozenset[DeviceNumber]) -> list[Mount]:
    """The mounts, of all namespaces, whose file system lies on one of the given devices itself."""
    return [mount for mount in all_mounts() if mount.filesystem != "overlay" and devices_of(mount) & numbers]


def carrying_devices() -> frozenset[DeviceNumber]:
    """The block devices with a file system in use, as far as its driver says so in sysfs (ext4, xfs, f2fs).

    Also where no mount of it is seen: unmounted lazily and still open, or in a mount namespace without a process.
    """
    found = set()
    for driver in _DRIVERS:
        for directory in driver.glob("*"):
            number = sysfs.number_of(Path("/sys/class/block") / directory.name)
            if number is not None:
                found.add(number)
    return frozenset(found)


def _block_nodes(paths: list[str]) -> Iterator[DeviceNumber]:
    for path in paths:
        try:
            status = os.stat(path) if path.startswith("/dev/") else None  # others may be on a dead server
        except OSError:
            continue
        if status and stat.S_ISBLK(status.st_mode):
            yield DeviceNumber.of(status.st_rdev)


def _btrfs_devices(mount: Mount) -> frozenset[DeviceNumber]:
    named = frozenset(_block_nodes([mount.source]))
    for devices in _BTRFS.glob("*/devices"):
        members = frozenset(sysfs.numbers_in(devices))
        if members & named:
            return members
    if named:
        return named
    # The name is one of another namespace, or its node has gone: the file system itself is asked.
    fsid = _btrfs_id(mount)
    return frozenset(sysfs.numbers_in(_BTRFS / fsid / "devices")) if fsid else frozenset()


def _xfs_devices(mount: Mount) -> frozenset[DeviceNumber]:
    if mount.filesystem != "xfs":
        return frozenset()
    options = [option.partition("=") for option in mount.super_options.split(",")]
    return frozenset(_block_nodes([unescape(value) for key, _, value in options if key in ("logdev", "rtdev")]))


def _btrfs_id(mount: Mount) -> str | None:
    information = bytearray(1024)  # highest device id, number of devices, then the id of the file system
    try:
        descriptor = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _BTRFS_IOC_FS_INFO, information)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return str(uuid.UUID(bytes=bytes(information[16:32])))


def _overlay_devices(mount: Mount) -> Iterator[DeviceNumber]:
    for option in mount.super_options.split(","):
        key, _, value = option.partition("=")
        if key not in ("upperdir", "lowerdir", "lowerdir+", "datadir+"):
            continue
        for layer in unescape(value).split(":"):
            try:
                device = file_status(layer, cached=True).filesystem
            except OSError:
                continue
            if device.major:
                yield device
