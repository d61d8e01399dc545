# SPDX-License-Identifier: MIT
"""How large each file of a difference storage is made when it is opened; it grows from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blksnap_ublk.errors import BlksnapError, Failed, UsageError
from blksnap_ublk.host.number import DeviceNumber

MIB = 1 << 20
FIRST = 256 * MIB
"""Bytes that a file begins with where nothing asks for less; it grows from there."""


@dataclass(frozen=True)
class Growable:
    """A file that may be extended; sizes in bytes.

    `size` is what an existing file has now, 0 for a directory and for a file that does not exist yet. `room` is what
    its file system has left, `room_with_reserve` what may be taken of it when the user gave no limit.
    """

    path: str
    size: int
    is_directory: bool
    filesystem: DeviceNumber
    room: int
    room_with_reserve: int


def plan_sizes(growables: Sequence[Growable], *, fixed: int, limit: int | None, needed: int, unit: int) -> list[int]:
    """The size that each file begins with, in the order given, never below its size now.

    `fixed` bytes lie in areas that do not grow. Existing files stay as they are; what is smaller than a unit, or does
    not exist yet, gets what the members `needed` at most, `FIRST` at most, and no more than its share of what `limit`
    leaves, or without one what the reserve of its file system leaves. Raises UsageError, Failed.
    """
    left = None if limit is None else limit - fixed - sum(each.size for each in growables)
    missing = needed - fixed - sum(each.size for each in growables)
    room = {each.filesystem: each.room if left is not None else each.room_with_reserve for each in growables}
    pending = sum(each.size < unit for each in growables)
    sizes = []
    for each in growables:
        if each.size >= unit:
            sizes.append(each.size)
            continue
        if left is None and not each.is_directory:
            raise UsageError("is empty", subject=each.path, advice="give --limit, the size that it may grow to")
        wanted = -(-min(max(missing, MIB), FIRST) // unit) * unit
        if left is not None:
            wanted = min(wanted, max(left // pending, min(left, unit)) + each.size)
        pending -= 1
        size = min(wanted, room[each.filesystem] + each.size) // unit * unit
        if size < (unit if left is not None else MIB):
            raise _nothing_left(each, limit, left, unit)
        room[each.filesystem] -= size - each.size
        missing -= size - each.size
        if left is not None:
            left -= size - each.size
        sizes.append(size)
    return sizes


def _nothing_left(each: Growable, limit: int | None, left: int | None, unit: int) -> BlksnapError:
    if left is None:
        return Failed(
            "less than 1 MiB could be taken while 5 %, and at least 1 GiB, of the file system stay free",
            subject=each.path, errno="ENOSPC", advice="free some space, or give --limit to use what there is",
        )  # fmt: skip
    if left + each.size < unit:
        text = f"nothing is left for it of the limit of {limit} bytes"
        return UsageError(text, subject=each.path, advice="give a larger --limit, or leave it out")
    return Failed(
        "the file system is full", subject=each.path, errno="ENOSPC", advice="free some space or name other storage"
    )
