# SPDX-License-Identifier: MIT
"""Files that were made longer for a difference storage are cut back, and those that were made for it are removed.

What others have done to a file meanwhile stays: one that somebody else has made longer, has locked, or that another
storage uses, is left as it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot import host_view
from blksnap_ublk.snapshot.catalogue import AreaEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.storage import Identity


def restore(
    areas: Sequence[AreaEntry],
    others: Collection[Identity] = (),
    held: Mapping[Identity, int] = MappingProxyType({}),
) -> list[str]:
    """Cuts back or removes the files of areas; what could not be done, in words.

    `others`: files that other storages use. `held`: descriptors of files that are ours, locked; what is not there is
    found by its path, and locked meanwhile.
    """
    warnings = []
    for file in _files(areas):
        if file.identity in others:
            if file.former_size < file.longest:
                warnings.append(f"{file.path}: stays as long as it is: another storage uses it")
            continue
        try:
            _restore(file, held.get(file.identity))
        except BlockingIOError:
            warnings.append(f"{file.path}: was left as it is: somebody else has locked it")
        except OSError as error:
            warnings.append(f"{file.path}: could not be cut back to its former size: {error.strerror}")
    return list(dict.fromkeys(warnings))


def held_files(context: Context, areas: Sequence[AreaEntry], closing: ExitStack) -> dict[Identity, int]:
    """Descriptors, which `closing` closes, of those files of areas that this process or the keeper has.

    For `restore`, after everybody else has let go of them.
    """
    found: dict[Identity, int] = {}
    for file in _files(areas):
        with suppress(OSError):
            found[file.identity] = _duplicate(context, file)
            closing.callback(os.close, found[file.identity])
    return found


@dataclass(frozen=True)
class _File:
    path: str
    descriptor: str
    identity: Identity
    former_size: int
    longest: int


def _files(areas: Sequence[AreaEntry]) -> list[_File]:
    """Each that is to be restored once."""
    found: dict[Identity, _File] = {}
    for area in areas:
        if area.former_size is None:
            continue
        identity = Identity(DeviceNumber(*area.filesystem), area.inode)
        known = found.get(identity)
        found[identity] = _File(
            path=area.path,
            descriptor=area.descriptor or (known.descriptor if known else ""),
            identity=identity,
            former_size=min(area.former_size, known.former_size if known else area.former_size),
            longest=max(area.longest, known.longest if known else 0),
        )
    return list(found.values())


def _duplicate(context: Context, file: _File) -> int:
    try:
        shared = context.registry.acquire(file.identity, _not_here)
    except OSError:
        return context.keeper.get(file.descriptor)
    try:
        return os.dup(shared)
    finally:
        context.registry.release(file.identity)


def _not_here() -> NoReturn:
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))


def _restore(file: _File, held: int | None) -> None:
    path = host_view.find(file.path)
    if held is not None and file.former_size >= 0:
        _cut(held, file)
        return
    try:
        status = os.lstat(path) if file.former_size < 0 else os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if 0 <= file.former_size < file.longest:
            raise OSError(errno.ENOENT, "it has another name now") from None
        return
    if not _is(file, status):
        return
    # Who put something else there after that look must not keep us waiting.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not _is(file, os.fstat(descriptor)):
            return
        if held is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if file.former_size < 0:
            os.unlink(path)
        else:
            _cut(descriptor, file)
    finally:
        os.close(descriptor)


def _is(file: _File, status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and (DeviceNumber.of(status.st_dev), status.st_ino) == file.identity


def _cut(descriptor: int, file: _File) -> None:
    size = os.fstat(descriptor).st_size
    if size > file.longest > file.former_size:
        text = f"it has {size} bytes and was made no longer than {file.longest}, so others have written to it"
        raise OSError(errno.EFBIG, text)
    if file.former_size < size <= file.longest:
        os.ftruncate(descriptor, file.former_size)
