# SPDX-License-Identifier: MIT
"""The runtime directory: its paths, and the lock that lets one daemon use it."""

import errno
import fcntl
import json
import os
import stat
from pathlib import Path

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
    """Another daemon, or a part of one, uses the runtime directory; the text says which."""


class RuntimeLock:
    """The flock on `daemon.lock`, held by the keeper and, through inherited descriptors, by its children.

    So a daemon whose keeper was killed still counts as running. The file names the processes.
    """

    def __init__(self, path: Path) -> None:
        """Raises AlreadyRunning or OSError."""
        self._path = path
        self.descriptor = _locked(path)
        self._processes: dict[str, int] = {}

    def name(self, role: str, pid: int) -> None:
        """Write down that process `pid` now is the `role`."""
        self._processes[role] = pid
        text = json.dumps(self._processes).encode() + b"\n"
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))

    def release(self, *, remove: bool) -> None:
        """Give this process' share of the lock up; `remove` the file when no child holds it any more."""
        if remove:
            self._path.unlink(missing_ok=True)
        os.close(self.descriptor)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former holder removes the file before it gives the lock up: this may be one that nobody else finds.
            if _same_file(descriptor, path):
                return descriptor
        except BlockingIOError:
            text = _holder(descriptor)
            os.close(descriptor)
            raise AlreadyRunning(text) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        processes = {str(role): int(pid) for role, pid in json.loads(os.pread(descriptor, 4096, 0)).items()}
    except (ValueError, AttributeError, TypeError):
        return "already running"
    keeper = processes.get("keeper")
    if keeper is not None and _alive(keeper):
        return f"already running (pid {keeper})"
    left = {role: pid for role, pid in processes.items() if _alive(pid)}
    if not left:
        return "already running"
    names = " and ".join(f"{role} (pid {pid})" for role, pid in left.items())
    # Control ends io; alone, io ends by SIGKILL only.
    command = f"kill -TERM {left['control']}" if "control" in left else f"kill -KILL {next(iter(left.values()))}"
    return f"already running: the keeper is gone, but {names} still serve; end them first: {command}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
