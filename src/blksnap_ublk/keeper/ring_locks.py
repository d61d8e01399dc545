# SPDX-License-Identifier: MIT
"""The barrier of storage rings: a flocked file for each io process.

A dead process' storage I/O can still land. So each io process has a file `ring-lock.N` among the state files whose lock
it holds through one open file, which lies in the fixed-file table of all its storage rings: the lock is free exactly
when the last storage I/O of that process has ended. Until then what it may still write to must not be given out again.

Before it has any ring, an io process signs its file: the name becomes `ring-lock.N.PID.STARTED`. So the dead are told
from the living. It is the name because a full tmpfs has no room for contents.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk.keeper.identity import Identity

_PREFIX = "ring-lock."


@dataclass(frozen=True)
class _File:
    path: Path
    number: int
    holder: Identity | None

    @classmethod
    def of(cls, path: Path) -> "_File | None":
        parts = path.name.removeprefix(_PREFIX).split(".")
        if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
            return None
        number, *holder = map(int, parts)
        return cls(path, number, Identity(*holder) if holder else None)

    @property
    def locked(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False  # another process has found it free and removed it, or it was signed right now: a living one
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)


class RingLocks:
    """The lock files in `directory`; `of_dead` tells whose storage I/O may still land."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def create(self) -> int:
        """A locked file for an io process that is about to start, after removing those whose lock is free.

        The descriptor is the caller's, who hands it to the io process and closes it: the lock lives as long as any
        duplicate. Raises OSError.
        """
        with self._alone():
            files = list(self._files())
            for file in files:
                if not file.locked:
                    file.path.unlink(missing_ok=True)
            number = 1 + max((file.number for file in files), default=0)
            # It gets its name when it is locked: whoever looks never finds it free, nor takes the lock by looking.
            unnamed = self._directory / f"{_PREFIX}new"
            descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unnamed.rename(self._directory / f"{_PREFIX}{number}")
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def held(self) -> set[int]:
        """Numbers of the io processes that live or whose storage I/O has not ended. Raises OSError."""
        return {file.number for file in self._files() if file.locked}

    def of_dead(self) -> set[int]:
        """Numbers of the io processes that have died and whose storage I/O has not ended. Raises OSError."""
        return {
            file.number for file in self._files() if file.holder is not None and not file.holder.alive and file.locked
        }

    def remove_free(self) -> None:
        """Remove the files whose lock is free. Raises OSError."""
        for file in self._files():
            if not file.locked:
                file.path.unlink(missing_ok=True)

    def _files(self) -> Iterator[_File]:
        for path in sorted(self._directory.glob(_PREFIX + "*")):
            file = _File.of(path)
            if file is not None:
                yield file

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two keepers make files at the same time while one takes over from the other."""
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)


def sign(descriptor: int) -> None:
    """For the io process: make known that it is the holder of this file, which `create` made. Raises OSError."""
    this = Identity.of()
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    os.rename(path, f"{path}.{this.pid}.{this.started}")
