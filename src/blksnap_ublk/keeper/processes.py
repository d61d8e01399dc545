# SPDX-License-Identifier: MIT
"""The file that names the processes of the daemon, for a keeper that has to find them and for whoever looks.

It lies among the state files, in memory: writing it waits for no device. It is one line of JSON in one page that was
allocated at the start, so that it is always whole and a full tmpfs does not matter.
"""

import os
from pathlib import Path

import msgspec

from blksnap_ublk.keeper.identity import Identity

_PAGE = 4096


class Member(Identity, frozen=True):
    """A child; `listener`: the number that its listening socket has in it."""

    listener: int = -1


class Record(msgspec.Struct):
    """`processes`: by role: `keeper`, `io`, `control`, and the spares `io-spare` and `control-spare`.

    `io_deaths`: when io processes died, in seconds of the monotonic clock. `managed`: a service manager starts a keeper
    that died again.
    """

    processes: dict[str, Member] = {}
    io_deaths: list[float] = []
    managed: bool = False

    def living(self, role: str) -> Member | None:
        """The process in that role, if it runs."""
        member = self.processes.get(role)
        return member if member is not None and member.alive else None


class ProcessesFile:
    """The file at `path`, open. One process writes it."""

    def __init__(self, path: Path) -> None:
        """Make it, or use the one that is there. Raises OSError."""
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(self._descriptor).st_size < _PAGE:
            os.pwrite(self._descriptor, b"{}".ljust(_PAGE - 1) + b"\n", 0)

    def read(self) -> Record:
        """What it says; nothing when it cannot be understood."""
        return _decoded(os.pread(self._descriptor, _PAGE, 0))

    def write(self, record: Record) -> None:
        """Replace what it says. Raises OSError."""
        os.pwrite(self._descriptor, msgspec.json.encode(record).ljust(_PAGE - 1) + b"\n", 0)

    def remove(self) -> None:
        """Remove the file; it may be gone already."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """End the use of it. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_processes(path: Path) -> Record:
    """What the file at `path` says; nothing when there is none or it cannot be understood."""
    try:
        with open(path, "rb") as file:
            return _decoded(file.read(_PAGE))
    except OSError:
        return Record()


def _decoded(data: bytes) -> Record:
    try:
        return msgspec.json.decode(data, type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Record()
