# SPDX-License-Identifier: MIT
"""Storage in a file on a file system that lies directly on a filtered device: where the extents of the file lie there.

Such storage is written on the origin, beneath the filter, by the extents of its file. The file is only there to keep
the file system from giving the blocks to others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blksnap_ublk.errors import NotFound, Unsupported
from blksnap_ublk.host import blockdev, extents, sysfs
from blksnap_ublk.host.extents import Extent, ExtentFlags
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.catalogue import AreaEntry
from blksnap_ublk.snapshot.storage.areas import AreaKind, Identity

MAX_EXTENTS = 4096
"""Areas that a storage can have."""

_MOVABLE = {
    ExtentFlags.SHARED: "shares blocks with another file (reflink)",
    ExtentFlags.ENCODED: "has blocks that cannot be written in place (compressed or encrypted)",
    ExtentFlags.INLINE: "has data within its inode",
    ExtentFlags.TAIL: "has data within its inode",
    ExtentFlags.DELALLOC: "has blocks that have no place on the device yet",
    ExtentFlags.UNKNOWN: "has blocks that have no place on the device yet",
}


@dataclass(frozen=True)
class Seat:
    """A filtered device with a file system on it, or on a partition of it. `start` in bytes, 0 without a partition.

    `device` is its key, `path` its node. Storage lies there in multiples of `unit` bytes.
    """

    device: str
    path: str
    unit: int
    filesystem: DeviceNumber
    start: int


@dataclass(frozen=True)
class Found:
    """A file that was opened and can be reserved. `size`: what it has now; `room`: what its file system has left."""

    kind: AreaKind
    identity: Identity
    size: int
    room: int
    filesystem: str
    publish: bool


class Piece(NamedTuple):
    """Bytes `offset` to `offset + length` of a file lie at byte `physical` of the filtered device."""

    offset: int
    physical: int
    length: int


def partition_start(number: DeviceNumber) -> int:
    """The byte of its disk where a partition begins; 0 for a disk. Raises NotFound."""
    where = sysfs.directory(number)
    return sysfs.integer(where, "start") * blockdev.SECTOR if (where / "partition").exists() else 0


def joined(found: Iterable[Extent]) -> list[Extent]:
    """The same extents in their order; those that follow one another in the file and on the device as one."""
    runs: list[Extent] = []
    for extent in found:
        last = runs[-1] if runs else None
        if last and last.start + last.length == extent.start and last.physical + last.length == extent.physical:
            runs[-1] = Extent(last.start, last.physical, last.length + extent.length, last.flags | extent.flags)
        else:
            runs.append(extent)
    return runs


def cut(found: Iterable[Extent], seat: Seat, ranges: Sequence[tuple[int, int]], unit: int) -> list[Piece]:
    """The pieces of a file that can be storage: within `ranges` (start, length) of the file, cut inward to whole units
    of the filtered device, and without those that have no room for one of the storage's own units of `unit` bytes.
    """
    runs = joined(found)
    pieces = []
    for start, length in ranges:
        for run in runs:
            first = max(run.start, start)
            last = min(run.start + run.length, start + length)
            if first >= last:
                continue
            begin = seat.start + run.physical + (first - run.start)
            end = begin + (last - first)
            whole_begin = -(-begin // seat.unit) * seat.unit
            whole_end = end // seat.unit * seat.unit
            if whole_end - whole_begin >= max(unit, seat.unit):
                pieces.append(Piece(first + whole_begin - begin, whole_begin, whole_end - whole_begin))
    return pieces


def refuse_movable(found: Iterable[Extent], path: str) -> None:
    """Raises Unsupported for extents that the file system does not keep, alone, where they are."""
    for extent in found:
        for flag, reason in _MOVABLE.items():
            if extent.flags & flag:
                advice = "name a file of its own on ext4 or xfs, or storage on another device"
                raise Unsupported(reason, subject=path, advice=advice)


def refuse_scattered(pieces: Sequence[Piece], path: str) -> None:
    """Raises Unsupported for no piece at all, and for more than a storage can have."""
    if not pieces:
        text = "has no run of blocks that is as long as a unit"
    elif len(pieces) > MAX_EXTENTS:
        text = f"lies in {len(pieces)} pieces, more than {MAX_EXTENTS}: the file system is too full or fragmented"
    else:
        return
    raise Unsupported(text, subject=path, advice="give a smaller --limit, free some space, or name other storage")


def verify(areas: Sequence[AreaEntry], descriptor: int) -> str | None:
    """What has changed, in words, about where the areas of one file lie, `descriptor` being that file; None: nothing.

    Asks the file system, and waits for it where that is necessary: not for a thread that holds locks of devices, for
    which `reservation.verify` is. Raises OSError.
    """
    return verify_pieces(pieces_of(areas), descriptor)


def pieces_of(areas: Sequence[AreaEntry]) -> list[Piece]:
    """The pieces that areas beneath filtered devices are."""
    return [Piece(area.offset, area.physical, area.length) for area in areas if area.physical is not None]


def verify_pieces(pieces: Sequence[Piece], descriptor: int) -> str | None:
    """The same for pieces."""
    if not pieces:
        return None
    status = os.fstat(descriptor)
    try:
        start = partition_start(DeviceNumber.of(status.st_dev))
    except NotFound:
        return "its device is gone"
    first = min(piece.offset for piece in pieces)
    end = max(piece.offset + piece.length for piece in pieces)
    if status.st_size < end:
        return f"the file was truncated to {status.st_size} bytes"
    found = joined(extents.extents(descriptor, first, end - first) or ())
    position = 0
    for piece in sorted(pieces):
        while position < len(found) and found[position].start + found[position].length <= piece.offset:
            position += 1
        run = found[position] if position < len(found) else None
        if run is None or run.start > piece.offset or run.start + run.length < piece.offset + piece.length:
            return f"{piece.length} bytes of the file at {piece.offset} have lost their blocks, or a part of them"
        if start + run.physical + (piece.offset - run.start) != piece.physical:
            return f"{piece.length} bytes of the file at {piece.offset} were moved to other blocks"
    return None
