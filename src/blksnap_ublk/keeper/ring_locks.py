# SPDX-License-Identifier: MIT
"""The barrier of storage rings: a flocked file for each io process.

A dead process' storage I/O can still land. So each io process has a file `ring-lock.N` among the state files whose lock
it holds through one open file, which lies in the fixed-file table of all its storage rings: the lock is free exactly
when the last storage I/O of that process has ended. Until then what it may still write to must not be given out again.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "ring-lock."


class RingLocks:
    """The lock files in `directory`. A successor learns from `held` which of its predecessors still have I/O out."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def create(self) -> int:
        """A locked file for an io process that is about to start, after removing those whose lock is free.

        The descriptor is the caller's, who hands it to the io process and closes it: the lock lives as long as any
        duplicate. Raises OSError.
        """
        held = self.held()
        number = 1 + max((number for number, _ in self._files()), default=0)
        for former, path in self._files():
            if former not in held:
                path.unlink()
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
        return {number for number, path in self._files() if _is_locked(path)}

    def remove_free(self) -> None:
        """Remove the files whose lock is free. Raises OSError."""
        for _, path in self._files():
            if not _is_locked(path):
                path.unlink()

    def _files(self) -> Iterator[tuple[int, Path]]:
        for path in sorted(self._directory.glob(_PREFIX + "*")):
            number = path.name.removeprefix(_PREFIX)
            if number.isdecimal():
                yield int(number), path


def _is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
