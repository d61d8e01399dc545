# SPDX-License-Identifier: MIT
"""Flags of a file that its file system keeps: what `chattr` sets, and what tells where and how its blocks are kept."""

from __future__ import annotations

import enum
import errno
import fcntl
import struct

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IOC_FSGETXATTR = 0x801C581F
_FLAGS = struct.Struct("=I4x")  # the kernel reads and writes an int, whatever the size in the number says
_EXTENDED_SIZE = 28
_REALTIME = 0x1
_ABSENT = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL)


class InodeFlags(enum.IntFlag, boundary=enum.KEEP):
    """The flags that matter to somebody who writes into the blocks of a file."""

    COMPRESSED = 0x0000_0004
    IMMUTABLE = 0x0000_0010
    ENCRYPTED = 0x0000_0800
    JOURNALLED = 0x0000_4000
    VERITY = 0x0010_0000
    INLINE = 0x1000_0000


def inode_flags(descriptor: int) -> InodeFlags:
    """The flags of an open file; none where the file system has no flags. Raises OSError."""
    buffer = bytearray(_FLAGS.size)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, buffer)
    except OSError as error:
        if error.errno in _ABSENT:
            return InodeFlags(0)
        raise
    return InodeFlags(_FLAGS.unpack(buffer)[0])


def set_immutable(descriptor: int, immutable: bool) -> None:
    """Sets or clears the immutable flag, if it is not as asked for already. Raises OSError."""
    flags = inode_flags(descriptor)
    wanted = flags | InodeFlags.IMMUTABLE if immutable else flags & ~InodeFlags.IMMUTABLE
    if wanted != flags:
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, _FLAGS.pack(wanted))


def is_realtime(descriptor: int) -> bool:
    """Whether the blocks of an xfs file lie on its realtime device, not on the one that `st_dev` names."""
    buffer = bytearray(_EXTENDED_SIZE)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_FSGETXATTR, buffer)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise
    return bool(struct.unpack_from("=I", buffer)[0] & _REALTIME)
