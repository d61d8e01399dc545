# SPDX-License-Identifier: MIT
"""State files, mapped."""

import errno
import mmap
import os
from contextlib import suppress
from typing import Self


def check_allocated(descriptor: int, least: int, what: str) -> int:
    """Bytes of a file that has no holes. Raises OSError(EBADMSG) for another, or one of less than `least`."""
    status = os.fstat(descriptor)
    if status.st_size < least:
        raise OSError(errno.EBADMSG, f"{what}: {status.st_size} bytes, {least} are needed")
    if status.st_blocks * 512 < status.st_size:
        raise OSError(errno.EBADMSG, f"{what}: only {status.st_blocks * 512} of {status.st_size} bytes are allocated")
    return status.st_size


class StateMap:
    """A state file mapped shared, all of it resident from the beginning. It has one user at first; see `hold`."""

    def __init__(self, descriptor: int, least: int, what: str) -> None:
        """`least`: bytes that are needed. The descriptor stays the caller's.

        Raises OSError(EBADMSG) for a file that is shorter or has holes: touching a hole of a full tmpfs would end the
        process.
        """
        size = check_allocated(descriptor, least, what)
        self.memory = mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._users = 1

    def hold(self) -> Self:
        """One more user, who closes it too."""
        self._users += 1
        return self

    def close(self) -> None:
        """One user less; unmapped after the last. What uses the memory must have been closed before."""
        self._users -= 1
        if self._users > 0:
            return
        # An exception on its way may still refer to it; the mapping goes when that has gone.
        with suppress(BufferError):
            self.memory.close()
