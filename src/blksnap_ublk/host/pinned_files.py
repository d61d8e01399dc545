# SPDX-License-Identifier: MIT
"""A note on a disk of the files that are made immutable as difference storage: a reboot forgets all else of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from blksnap_ublk.host.inode_flags import InodeFlags, inode_flags, set_immutable

NAME = "immutable-files"
_PATH_MAX = 1 << 20


class PinnedFile(msgspec.Struct, frozen=True):
    """`inode` tells whether `path` still leads to it; device numbers change with a reboot."""

    path: str
    inode: int


def remember(directory: Path, files: Collection[PinnedFile]) -> None:
    """Notes the files in `directory`, besides those noted before that still are immutable. Raises OSError."""
    before = noted(directory)
    wanted = sorted({*files, *(file for file in before if is_pinned(file))}, key=lambda file: (file.path, file.inode))
    if wanted == before:
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    writing = directory / (NAME + ".writing")
    descriptor = os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.encode(wanted))
        file.flush()
        os.fsync(descriptor)
    writing.rename(directory / NAME)


def noted(directory: Path) -> list[PinnedFile]:
    """What was noted last; nothing where that cannot be read."""
    try:
        with (directory / NAME).open("rb") as file:
            return msgspec.json.decode(file.read(_PATH_MAX), type=list[PinnedFile])
    except (OSError, msgspec.MsgspecError):
        return []


def is_pinned(file: PinnedFile) -> bool:
    """Whether it is there, and immutable."""
    try:
        with _opened(file) as descriptor:
            return bool(inode_flags(descriptor) & InodeFlags.IMMUTABLE)
    except OSError:
        return False


def release(file: PinnedFile) -> None:
    """Lets it be changed again. Raises OSError."""
    with _opened(file) as descriptor:
        set_immutable(descriptor, False)


@contextmanager
def _opened(file: PinnedFile) -> Iterator[int]:
    """Raises FileNotFoundError also for another file under its name."""
    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if status.st_ino != file.inode or not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(2, "another file", file.path)
        yield descriptor
    finally:
        os.close(descriptor)
