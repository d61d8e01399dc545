# SPDX-License-Identifier: MIT
"""The holdings, kept by the service manager as well: so they outlive the death of all our processes at once.

The manager keeps each open file once, however often it is given, and with one name only. So each open file gets a
name of ours there, `file-N`, and a file in memory, `index-N`, says which holdings it stands for. An index is never
altered: the next one is given before the former is taken away, so that whoever dies leaves one that holds.
"""

import ctypes
import itertools
import json
import logging
import os
import platform
from contextlib import suppress

from blksnap_ublk.keeper.service_manager import ServiceManager

log = logging.getLogger(__name__)

_FILE, _INDEX = "file-", "index-"
_KCMP = {"x86_64": 312, "s390x": 343, "ppc64le": 354, "aarch64": 272, "riscv64": 272}
_KCMP_FILE = 0

_libc = ctypes.CDLL(None, use_errno=True)


class FdStore:
    """What the service manager keeps for us. Without a manager it keeps nothing."""

    def __init__(self, manager: ServiceManager) -> None:
        self._manager = manager
        self._numbers = itertools.count(1)
        self._files: dict[str, int] = {}
        """Name in the store -> a duplicate of the descriptor, to know it again."""
        self._holdings: dict[str, str] = {}
        """Name of a holding -> name in the store."""
        self._index: str | None = None

    def restore(self) -> dict[str, int]:
        """What former keepers put, by name; the descriptors are the caller's. Once, before anything is put."""
        handed_over = self._manager.take_handed_over()
        indices = sorted((_number(name), name, number) for name, number in handed_over if name.startswith(_INDEX))
        for _, name, number in indices:
            read = _read_index(number)
            if read is not None:
                self._holdings, self._index = read, name
        wanted = set(self._holdings.values())
        for name, number in handed_over:
            if name in wanted and name not in self._files:
                self._files[name] = number
                continue
            os.close(number)
            if name != self._index and name not in wanted:
                self._remove(name)
        self._holdings = {name: file for name, file in self._holdings.items() if file in self._files}
        self._numbers = itertools.count(1 + max((_number(name) for name, _ in handed_over), default=0))
        return {name: os.dup(self._files[file]) for name, file in self._holdings.items()}

    def put(self, name: str, descriptor: int) -> None:
        """Keep the open file of `descriptor` under `name`, in place of what was kept under it."""
        if not self._manager.present:
            return
        file = self._known(descriptor)
        if file is None:
            file = f"{_FILE}{next(self._numbers)}"
            # Without FDPOLL=0 a file that reports an error would be dropped.
            self._manager.send("FDSTORE=1", f"FDNAME={file}", "FDPOLL=0", descriptor=descriptor)
            self._files[file] = os.dup(descriptor)
        self._holdings[name] = file
        self._changed()

    def drop(self, name: str) -> None:
        """Do not keep what is kept under `name`, if there is something."""
        if self._holdings.pop(name, None) is not None:
            self._changed()

    def forget(self) -> None:
        """Keep nothing any more."""
        self._holdings.clear()
        self._drop_unused()
        if self._index is not None:
            self._remove(self._index)
            self._index = None

    def close(self) -> None:
        """End the use of it by this process; what is kept stays kept."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _changed(self) -> None:
        former, self._index = self._index, f"{_INDEX}{next(self._numbers)}"
        index = os.memfd_create(self._index, os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(index), "wb") as file:
                file.write(json.dumps(self._holdings).encode())
            self._manager.send("FDSTORE=1", f"FDNAME={self._index}", "FDPOLL=0", descriptor=index)
        finally:
            os.close(index)
        if former is not None:
            self._remove(former)
        self._drop_unused()

    def _drop_unused(self) -> None:
        for file in set(self._files) - set(self._holdings.values()):
            self._remove(file)
            os.close(self._files.pop(file))

    def _remove(self, name: str) -> None:
        if name:
            self._manager.send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _known(self, descriptor: int) -> str | None:
        return next((file for file, known in self._files.items() if _same_open_file(known, descriptor)), None)


def _read_index(descriptor: int) -> dict[str, str] | None:
    with suppress(OSError, ValueError):
        read = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        if isinstance(read, dict) and all(isinstance(file, str) for file in read.values()):
            return read
    log.warning("the index of the descriptors that the service manager has kept cannot be read")
    return None


def _number(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _same_open_file(one: int, other: int) -> bool:
    if not os.path.samestat(os.fstat(one), os.fstat(other)):
        return False
    call = _KCMP.get(platform.machine())
    if call is None:
        return True
    pid = os.getpid()
    result = int(_libc.syscall(call, pid, pid, _KCMP_FILE, ctypes.c_ulong(one), ctypes.c_ulong(other)))
    # A kernel without this call: our own descriptors of one file have been opened once.
    return result <= 0
