# SPDX-License-Identifier: MIT
"""System calls on files for which Python has no wrapper: statx, fstatfs, fallocate."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

from blksnap_ublk.host.number import DeviceNumber

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_WRITE_ZEROES = 0x80  # since 6.17: allocates written, not unwritten, space

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC = 0x07FF
_STATX_MNT_ID = 0x1000
_STATX_DIOALIGN = 0x2000
_ATTR_IMMUTABLE = 0x10
_ATTR_APPEND = 0x20
# mask, blksize, attributes, nlink, uid, gid, mode, (pad), ino, size, blocks, attributes_mask, four timestamps,
# rdev, dev, mnt_id, dio_mem_align, dio_offset_align
_STATX = struct.Struct("=IIQIIIHxxQQQQ64xIIIIQII")
_STATX_SIZE = 256

_libc = ctypes.CDLL(None, use_errno=True)


class DirectIo(NamedTuple):
    """What O_DIRECT asks for, in bytes; both 0 where the file does not have it."""

    memory: int
    offset: int


@dataclass(frozen=True)
class FileStatus:
    """One statx: sizes in bytes; `mount_id` and `direct_io` are None where the kernel does not tell."""

    mode: int
    inode: int
    size: int
    allocated: int
    immutable: bool
    append_only: bool
    node: DeviceNumber
    filesystem: DeviceNumber
    mount_id: int | None
    direct_io: DirectIo | None


def file_status(target: str | int, *, cached: bool = False) -> FileStatus:
    """Status of a path (symlinks are followed) or a descriptor.

    `cached` takes what the kernel knows and never waits for a server of a network file system. Raises OSError.
    """
    path, at = ("", target) if isinstance(target, int) else (target, _AT_FDCWD)
    flags = (_AT_EMPTY_PATH if isinstance(target, int) else 0) | (_AT_STATX_DONT_SYNC if cached else 0)
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    wanted = ctypes.c_uint(_STATX_BASIC | _STATX_MNT_ID | _STATX_DIOALIGN)
    if _libc.statx(at, os.fsencode(path), flags, wanted, buffer) != 0:
        raise _error(target)
    f = _STATX.unpack_from(buffer.raw)
    mask, attributes = f[0], f[2]
    return FileStatus(
        mode=f[6],
        inode=f[7],
        size=f[8],
        allocated=f[9] * 512,
        immutable=bool(attributes & _ATTR_IMMUTABLE),
        append_only=bool(attributes & _ATTR_APPEND),
        node=DeviceNumber(f[11], f[12]),
        filesystem=DeviceNumber(f[13], f[14]),
        mount_id=f[15] if mask & _STATX_MNT_ID else None,
        direct_io=DirectIo(f[16], f[17]) if mask & _STATX_DIOALIGN else None,
    )


def filesystem_magic(descriptor: int) -> int:
    """The type of the file system that a descriptor lies on (`f_type` of statfs). Raises OSError."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(descriptor, buffer) != 0:
        raise _error(descriptor)
    return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF


def fallocate(descriptor: int, mode: int, start: int, length: int) -> None:
    """fallocate(2), begun again when a signal interrupts it; offsets in bytes. Raises OSError."""
    while _libc.fallocate(descriptor, mode, ctypes.c_int64(start), ctypes.c_int64(length)) != 0:
        if ctypes.get_errno() != errno.EINTR:
            raise _error(descriptor)


def _error(target: str | int) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), target)
