# SPDX-License-Identifier: MIT
"""The tmpfs of the state files, and the mount namespace of the daemon.

The tmpfs is mounted in the namespace that the daemon is started in, the host's, before it gets one of its own: so the
state outlives the daemon. Our namespace is a slave: mounts and unmounts of the host arrive in it, ours do not arrive
there. A private copy of a mount would pin a file system that the host has unmounted; so where the host's mounts do not
propagate (no systemd, a container) the daemon stays in the host's namespace.
"""

import ctypes
import errno
import logging
import os
from pathlib import Path

from blksnap_ublk.keeper.mount_table import mount_at, mounts

log = logging.getLogger(__name__)

DEFAULT_SHARE = 4
"""One part in so many of the machine's memory is what state files may take, unless told otherwise …"""

DEFAULT_LIMIT = 16 << 30
"""… but no more than this, in bytes."""

_CLONE_NEWNS = 0x00020000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_REC, _MS_SLAVE = 2, 4, 8, 32, 1 << 14, 1 << 19
_FLAGS = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


def default_size() -> int:
    """Bytes that the state files may take together by default."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory // DEFAULT_SHARE, DEFAULT_LIMIT)


def enter_host(namespace: int) -> None:
    """Go to the mount namespace of the host, which a process of the daemon has handed over; closes the descriptor.

    For a process that is about to become the keeper. Raises OSError.
    """
    try:
        _check(_libc.setns(namespace, _CLONE_NEWNS), "the host's mount namespace")
    finally:
        os.close(namespace)


class StateMount:
    """The tmpfs at `path`, at most `size` bytes; `found`: a former daemon left it, with the state of its devices.

    Such a one is used again, with its size changed to `size` unless that is None. `host`: a descriptor of the host's
    mount namespace, -1 where the daemon stays in it.
    """

    def __init__(self, path: Path, size: int | None) -> None:
        """Also goes to a mount namespace of our own, if it may. Single-threaded processes only. Raises OSError."""
        self.path = path.absolute()
        self.found = self._is_mounted()
        self.host = -1
        self._mount(size)
        try:
            self._leave_host()
        except BaseException:
            if not self.found:
                _unmount(self.path)
            self.close()
            raise

    def remove(self) -> None:
        """Unmount it everywhere and remove its directory. All other users must have ended. Raises OSError."""
        try:
            if self.host >= 0:
                # In ours first: where its own mount is private the host's unmount would not arrive here.
                _unmount(self.path)
                _check(_libc.setns(self.host, _CLONE_NEWNS), "setns")
            _unmount(self.path)
            self.path.rmdir()
        finally:
            self.close()

    def close(self) -> None:
        """Leave the tmpfs to the next daemon."""
        if self.host >= 0:
            os.close(self.host)
            self.host = -1

    def _is_mounted(self) -> bool:
        mount = mount_at(self.path)
        if mount is not None and mount.kind != "tmpfs":
            raise OSError(errno.EBUSY, f"a {mount.kind} file system is mounted here; unmount it", str(self.path))
        return mount is not None

    def _mount(self, size: int | None) -> None:
        if self.found:
            if size is not None:
                _check(_mount_tmpfs(self.path, _MS_REMOUNT, f"size={size}"), self.path)
            return
        self.path.mkdir(mode=0o700, exist_ok=True)
        options = f"size={default_size() if size is None else size},mode=0700"
        # noswap: since 6.4
        for choice in (options + ",noswap", options):
            result = _mount_tmpfs(self.path, 0, choice)
            if result == 0 or ctypes.get_errno() != errno.EINVAL:
                break
        _check(result, self.path)

    def _leave_host(self) -> None:
        pinned = [mount.point for mount in mounts() if not mount.propagates and not mount.virtual]
        if pinned:
            log.info("staying in the host's mount namespace: %s does not propagate its mounts", pinned[0])
            return
        self.host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        _check(_libc.unshare(_CLONE_NEWNS), "unshare")
        _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None), "mount namespace")


def _mount_tmpfs(path: Path, flags: int, options: str) -> int:
    return int(_libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", flags | _FLAGS, options.encode()))


def _unmount(path: Path) -> None:
    if _libc.umount2(os.fsencode(path), 0) != 0 and ctypes.get_errno() != errno.EINVAL:  # EINVAL: not mounted
        _check(-1, path)


def _check(result: int, subject: object) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(subject))
