# SPDX-License-Identifier: MIT
"""What I/O goes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.handle import Handle, check, create


@dataclass(frozen=True)
class FileInfo:
    """`size` in bytes; `block`: what O_DIRECT offsets and lengths are a multiple of, 512 where it is not `direct`."""

    size: int
    block: int
    is_device: bool
    direct: bool


class File(Handle):
    """A regular file or block device: a duplicate of a descriptor that somebody else opened.

    To be closed when no device or storage uses it any more.
    """

    _name = "file"

    def __init__(self, fd: int, *, storage: bool = False) -> None:
        """`storage`: its I/O goes to the storage rings of the threads. OSError(EINVAL) for other kinds of files."""
        super().__init__(create(lib.bsu_file_new, fd, what=f"descriptor {fd}"))
        if storage:
            lib.bsu_file_set_storage(self._pointer)

    @property
    def info(self) -> FileInfo:
        """Size and properties at the moment."""
        out = ffi.new("struct bsu_file_info *")
        check(lib.bsu_file_info(self.pointer, out), "file information")
        return FileInfo(out.size, out.block, out.is_device, out.direct)

    def _free(self, pointer: Any) -> None:
        lib.bsu_file_free(pointer)
