# SPDX-License-Identifier: MIT
"""File systems: which type a file lies on, how much room it has, and what it can be trusted with."""

from __future__ import annotations

import os
from dataclasses import dataclass

from blksnap_ublk.host.syscalls import filesystem_magic

GIB = 1 << 30
_UNKNOWN = 1 << 62  # a tmpfs without a size
_NETWORK = "is a network file system"
_REWRITES = "moves blocks when they are overwritten"
_LAYERED = "passes I/O on to another file system or process"

# magic: (name, reason why a block that was allocated once may not be written in place by itself)
_TYPES: dict[int, tuple[str, str | None]] = {
    0x0000EF53: ("ext4", None),
    0x58465342: ("xfs", None),
    0x01021994: ("tmpfs", None),
    0x9123683E: ("btrfs", _REWRITES),
    0xCA451A4E: ("bcachefs", _REWRITES),
    0x2FC12FC1: ("zfs", _REWRITES),
    0xF2F52010: ("f2fs", _REWRITES),
    0x00003434: ("nilfs2", _REWRITES),
    0x00006969: ("nfs", _NETWORK),
    0xFF534D42: ("cifs", _NETWORK),
    0xFE534D42: ("smb2", _NETWORK),
    0x0000517B: ("smb", _NETWORK),
    0x01021997: ("9p", _NETWORK),
    0x00C36400: ("ceph", _NETWORK),
    0x5346414F: ("afs", _NETWORK),
    0x73757245: ("coda", _NETWORK),
    0x0BD00BD0: ("lustre", _NETWORK),
    0x01161970: ("gfs2", _NETWORK),
    0x7461636F: ("ocfs2", _NETWORK),
    0x794C7630: ("overlay", _LAYERED),
    0x65735546: ("fuse", _LAYERED),
    0x0000F15F: ("ecryptfs", _LAYERED),
    0x786F4256: ("vboxsf", _LAYERED),
    0x00C0FFEE: ("hostfs", _LAYERED),
}


@dataclass(frozen=True)
class FileSystemType:
    """`objection` says why files on it cannot be written in place below a filter; None where they can."""

    name: str
    objection: str | None


def type_of(descriptor: int) -> FileSystemType:
    """The type of the file system that a descriptor lies on. Raises OSError."""
    magic = filesystem_magic(descriptor)
    name, objection = _TYPES.get(magic, (f"type {magic:#x}", "is not known to write in place"))
    return FileSystemType(name, objection)


def room(descriptor: int) -> int:
    """Bytes that may still be allocated on the file system of a descriptor. Raises OSError."""
    status = os.fstatvfs(descriptor)
    return status.f_bavail * status.f_frsize if status.f_blocks else _UNKNOWN


def room_with_reserve(descriptor: int) -> int:
    """Bytes that may be allocated while 5 %, and at least 1 GiB, of the file system stay free; 0 if none may."""
    status = os.fstatvfs(descriptor)
    reserve = max(status.f_blocks * status.f_frsize // 20, GIB)
    return max(status.f_bavail * status.f_frsize - reserve, 0)
