# SPDX-License-Identifier: MIT
"""The runtime directory: its paths, and the lock that lets one daemon use it."""

import errno
import fcntl
import os
import stat
from pathlib import Path

from blksnap_ublk.keeper.processes import read_processes

DEFAULT = "/run/blksnap-ublk"
VARIABLE = "BLKSNAP_UBLK_RUN"


class RuntimePaths:
    """What lies in the runtime directory `root`."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.lock = self.root / "daemon.lock"
        self.log = self.root / "log"
        self.keeper_socket = self.root / "keeper.sock"
        self.io_socket = self.root / "io.sock"
        self.varlink_socket = self.root / "io.blksnap.Ublk"
        self.state = self.root / "state"
        self.processes = self.state / "processes"
        self.layout = self.state / "layout"
        self.roles = self.root / "udev"

    @classmethod
    def from_environment(cls) -> "RuntimePaths":
        """The directory named by BLKSNAP_UBLK_RUN, or the default one; absolute."""
        return cls(os.path.abspath(os.environ.get(VARIABLE) or DEFAULT))

    def create(self) -> None:
        """Make the directory, mode 0700, unless it is there.

        Raises OSError; EPERM for a directory that other users own or may write to.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.root.stat()
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            text = "others may write to this runtime directory; chown and chmod 0700 it"
            raise OSError(errno.EPERM, text, str(self.root))


class AlreadyRunning(Exception):
    """Another keeper uses the runtime directory; the text says which."""


class RuntimeLock:
    """The flock on `daemon.lock`: whoever has it is the keeper of the runtime directory."""

    def __init__(self, paths: RuntimePaths, handed_over: int | None = None) -> None:
        """`handed_over`: a duplicate of the descriptor of a keeper that is about to leave; it becomes ours.

        Raises AlreadyRunning or OSError.
        """
        self._path = paths.lock
        self.descriptor = _locked(paths) if handed_over is None else handed_over

    def release(self, *, remove: bool) -> None:
        """Give the lock up, unless another keeper has a duplicate; `remove` the file as well."""
        if remove:
            self._path.unlink(missing_ok=True)
        os.close(self.descriptor)


def _locked(paths: RuntimePaths) -> int:
    while True:
        descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former holder removes the file before it gives the lock up: this may be one that nobody else finds.
            if _same_file(descriptor, paths.lock):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            keeper = read_processes(paths.processes).living("keeper")
            raise AlreadyRunning("already running" + (f" (pid {keeper.pid})" if keeper else "")) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
