# SPDX-License-Identifier: MIT
"""The answer to the question what changed, and what is known of the stretch that is asked for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.cbt import query
from blksnap_ublk.cbt.cursor import Cursor
from blksnap_ublk.cbt.errors import NoSuchSnapshot
from blksnap_ublk.cbt.layer import Layer
from blksnap_ublk.cbt.state import State


@dataclass(frozen=True, eq=False, slots=True)
class Changes:
    """What changed between two instants. `all` means: take everything, for `reason`; then `ranges` is the device.

    `ranges` is an int64 array of shape (n, 2): byte start and byte length, ascending, touching ones joined.
    """

    since: Cursor | None
    until: Cursor
    tracking_block: int
    all: bool
    reason: str | None
    changed_bytes: int
    ranges: NDArray[np.int64]


def changes(current: State, since: Cursor | None, until: int | None) -> Changes:
    """As `History.changes`."""
    end = _end(current, until)
    reason = _unknown(current, since, end)
    size = current.size_at(end)
    if reason is None:
        ranges = query.byte_ranges(_layers_to(current, end), _number(since), current.geometry)
        # What counts as changed in the last block ends where the device ended then.
        np.minimum(ranges[:, 1], size - ranges[:, 0], out=ranges[:, 1])
        ranges = ranges[ranges[:, 1] > 0]
    else:
        ranges = np.array([[0, size]], np.int64)
    return Changes(
        since=since,
        until=Cursor(current.generation, end),
        tracking_block=current.geometry.tracking_block,
        all=reason is not None,
        reason=reason,
        changed_bytes=int(ranges[:, 1].sum()),
        ranges=ranges,
    )


def changed_blocks(current: State, since: Cursor | None, until: int | None) -> NDArray[np.bool_]:
    """As `History.changed_blocks`."""
    end = _end(current, until)
    if _unknown(current, since, end) is not None:
        return np.ones(current.geometry.blocks, np.bool_)
    return query.changed_blocks(_layers_to(current, end), _number(since), current.geometry)


def listed(numbers: Collection[int]) -> str:
    """Change numbers for people."""
    return ", ".join(map(str, sorted(numbers))) or "none"


def _number(since: Cursor | None) -> int:
    return 0 if since is None else since.number


def _end(current: State, until: int | None) -> int:
    end = current.number if until is None else until
    if current.number == 0:
        raise NoSuchSnapshot("no snapshot has been taken yet; changes are known up to a snapshot")
    if end != current.number and end not in current.held:
        raise NoSuchSnapshot(
            f"snapshot {end} is not held; changes are known up to those that are ({listed(current.held)}) "
            f"and the last one taken ({current.number})"
        )
    return end


def _unknown(current: State, since: Cursor | None, end: int) -> str | None:
    """Why the changes from `since` to `end` are not known; None if they are."""
    if since is not None and since.generation != current.generation:
        former = current.former
        return former.reason if former is not None and since.generation == former.generation else "new-generation"
    if _number(since) > end:
        return "future"
    return current.reason if _number(since) < current.known_since else None


def _layers_to(current: State, end: int) -> list[Layer]:
    return [layer for layer in current.layers if layer.last <= end]
