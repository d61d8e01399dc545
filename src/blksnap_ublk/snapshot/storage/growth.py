# SPDX-License-Identifier: MIT
"""How large each file of a difference storage is made when it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blksnap_ublk.errors import BlksnapError, Failed, UsageError
from blksnap_ublk.host.number import DeviceNumber

MIB = 1 << 20


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
    """The size that each file is to have, in the order given, never below its size now.

    `fixed` bytes lie in areas that do not grow. With a limit it is reached, by the first files that have the room.
    Without one, existing files stay as they are and directories together get what the members `needed` at most.
    Raises UsageError, Failed.
    """
    if limit is None:
        return _without_limit(growables, fixed, needed, unit)
    return _up_to_limit(growables, fixed, limit, unit)


def _up_to_limit(growables: Sequence[Growable], fixed: int, limit: int, unit: int) -> list[int]:
    rest = limit - fixed - sum(each.size for each in growables)
    room = {each.filesystem: each.room for each in growables}
    sizes = []
    for each in growables:
        taken = max(min(rest, room[each.filesystem]), 0) // unit * unit
        room[each.filesystem] -= taken
        rest -= taken
        if each.size + taken < unit:
            raise _nothing_left(each, limit, rest, unit)
        sizes.append(each.size + taken)
    if growables and rest >= unit:
        raise Failed(
            f"the file system has no room for {limit} bytes, {rest} are missing",
            subject=growables[-1].path, errno="ENOSPC", advice="give a smaller --limit or more storage",
        )  # fmt: skip
    return sizes


def _nothing_left(each: Growable, limit: int, rest: int, unit: int) -> BlksnapError:
    if rest < unit:
        text = f"nothing is left for it of the limit of {limit} bytes"
        return UsageError(text, subject=each.path, advice="give a larger --limit, or leave it out")
    return Failed(
        "the file system is full", subject=each.path, errno="ENOSPC", advice="free some space or name other storage"
    )


def _without_limit(growables: Sequence[Growable], fixed: int, needed: int, unit: int) -> list[int]:
    missing = needed - fixed - sum(each.size for each in growables)
    room = {each.filesystem: each.room_with_reserve for each in growables}
    sizes = []
    for each in growables:
        if not each.is_directory:
            if each.size < unit:
                raise UsageError("is empty", subject=each.path, advice="give --limit, the size that it may grow to")
            sizes.append(each.size)
            continue
        wanted = -(-max(missing, MIB) // unit) * unit
        taken = min(wanted, room[each.filesystem]) // unit * unit
        if taken < MIB:
            raise Failed(
                "less than 1 MiB could be taken while 5 %, and at least 1 GiB, of the file system stay free",
                subject=each.path, errno="ENOSPC", advice="free some space, or give --limit to use what there is",
            )  # fmt: skip
        room[each.filesystem] -= taken
        missing -= taken
        sizes.append(taken)
    return sizes
