# SPDX-License-Identifier: MIT
"""Files of origins and areas: one for each inode or block device, however many areas it has."""

import os
import stat
from dataclasses import dataclass, field

from blksnap_ublk.engine import File


@dataclass
class SharedFile:
    """A file with its users counted. `held`: the names under which the keeper holds its `descriptor`."""

    file: File
    key: tuple[bool, bool, int, int]
    descriptor: int
    users: int = 1
    held: set[str] = field(default_factory=set)


class SharedFiles:
    """All files that I/O is done on. An origin and an area never share one: their I/O goes to different rings."""

    def __init__(self) -> None:
        self._files: dict[tuple[bool, bool, int, int], SharedFile] = {}

    def get(self, descriptor: int, *, storage: bool, held: str = "") -> SharedFile:
        """The file of `descriptor`, which stays the caller's. Raises OSError; EINVAL for what has no blocks.

        `held`: the name under which the keeper holds the descriptor, or nothing.
        """
        status = os.fstat(descriptor)
        is_device = stat.S_ISBLK(status.st_mode)
        key = (storage, is_device, *((status.st_rdev, 0) if is_device else (status.st_dev, status.st_ino)))
        shared = self._files.get(key)
        if shared is None:
            file = File(descriptor, storage=storage)
            shared = self._files[key] = SharedFile(file, key, os.dup(descriptor))
        else:
            shared.users += 1
        if held:
            shared.held.add(held)
        return shared

    def held(self) -> list[tuple[str, int]]:
        """The descriptors that the keeper holds too, by their names, in the order of these."""
        return sorted((name, shared.descriptor) for shared in self._files.values() for name in shared.held)

    def put(self, shared: SharedFile) -> None:
        """One user less; the last one's file is closed."""
        shared.users -= 1
        if shared.users == 0:
            del self._files[shared.key]
            shared.file.close()
            os.close(shared.descriptor)
