# SPDX-License-Identifier: MIT
"""What can be done with a mounted file system as a whole: find it by its mount, write it back, freeze it, thaw it.

Only the standard library is imported: short-lived helper processes use this.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat

_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878
_libc = ctypes.CDLL(None, use_errno=True)


def open_mount(path: str, mount_id: int) -> int:
    """A descriptor of the top of a mount, which may be a directory or a file.

    Raises OSError; ESTALE where the path leads to another mount, because that one hides it or it has gone.
    """
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if _mount_id(handle) != mount_id:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        mode = os.fstat(handle).st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):  # opening others has effects of its own
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(handle)


def write_back(descriptor: int) -> int:
    """syncfs(2); 0 or a positive errno."""
    return 0 if _libc.syncfs(descriptor) == 0 else ctypes.get_errno()


def freeze(descriptor: int) -> int:
    """FIFREEZE: returns when nobody writes any more. 0 or a positive errno: EBUSY if it is frozen already."""
    return _ioctl(descriptor, _FIFREEZE)


def thaw(descriptor: int) -> int:
    """FITHAW; waits for a FIFREEZE under way. 0 or a positive errno: EINVAL if it is not frozen."""
    return _ioctl(descriptor, _FITHAW)


def _ioctl(descriptor: int, request: int) -> int:
    try:
        fcntl.ioctl(descriptor, request, 0)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _mount_id(descriptor: int) -> int | None:
    with open(f"/proc/self/fdinfo/{descriptor}") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key == "mnt_id":
                return int(value)
    return None
