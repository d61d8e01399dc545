# SPDX-License-Identifier: MIT
"""The state of a history at one moment, and its form on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.cbt.bitmap import Bitmap
from blksnap_ublk.cbt.geometry import Geometry
from blksnap_ublk.cbt.last_change import LastChangeArray
from blksnap_ublk.cbt.layer import ArrayLayer, IntervalLayer, Layer
from blksnap_ublk.cbt.metadata import FormerRecord, HistoryRecord, LayerRecord, ResizingRecord


@dataclass(frozen=True, eq=False)
class State:
    """Never altered, only followed by another one, so that a query works on one state from beginning to end."""

    generation: UUID
    number: int
    known_since: int
    """Changes after this number are known; more than 0 if a history was lost, which `reason` explains."""
    reason: str | None
    active: Bitmap
    prepared: Bitmap | None = None
    held: frozenset[int] = frozenset()
    layers: tuple[Layer, ...] = ()
    """Oldest first, without a gap from `known_since` to `number`."""
    former: FormerRecord | None = None
    resizing: Bitmap | None = None
    """The active bitmap for another size: it may be marked in already, instead of the active one."""
    grown: tuple[tuple[int, int], ...] = ()
    """Pairs, ascending: up to this change number the device had this many bytes."""

    @property
    def geometry(self) -> Geometry:
        """Size and tracking block of the device."""
        return self.active.geometry

    def size_at(self, number: int) -> int:
        """Bytes of the device when snapshot `number` was taken."""
        return next((size for last, size in self.grown if number <= last), self.geometry.size)

    def bitmaps(self) -> list[Bitmap]:
        """Those that are no layers yet."""
        return [bitmap for bitmap in (self.active, self.prepared, self.resizing) if bitmap is not None]

    def paths(self) -> set[Path]:
        """The data files."""
        return {*(bitmap.path for bitmap in self.bitmaps()), *(layer.path for layer in self.layers)}


def to_record(state: State) -> HistoryRecord:
    """What is written of a state."""
    geometry = state.geometry
    resizing = state.resizing
    return HistoryRecord(
        generation=state.generation,
        size=geometry.size,
        tracking_block=geometry.tracking_block,
        number=state.number,
        held=tuple(sorted(state.held)),
        known_since=state.known_since,
        reason=state.reason,
        active=state.active.path.name,
        prepared=None if state.prepared is None else state.prepared.path.name,
        layers=tuple(
            LayerRecord(
                layer.path.name,
                layer.first,
                layer.last,
                _to_runs(layer.numbers) if isinstance(layer, ArrayLayer) else None,
            )
            for layer in state.layers
        ),
        former=state.former,
        resizing=None if resizing is None else ResizingRecord(resizing.path.name, resizing.geometry.size),
        grown=state.grown,
    )


def from_record(record: HistoryRecord, directory: Path) -> State:
    """Map and check the files that a record names. Raises HistoryDamaged, OSError."""
    geometry = Geometry(record.size, record.tracking_block)
    resizing = None
    longer = record.resizing is not None
    if record.resizing is not None:
        following = Geometry(record.resizing.size, record.tracking_block)
        resizing = Bitmap(directory / record.resizing.file, following)
    return State(
        generation=record.generation,
        number=record.number,
        known_since=record.known_since,
        reason=record.reason,
        active=Bitmap(directory / record.active, geometry),
        prepared=None if record.prepared is None else Bitmap(directory / record.prepared, geometry),
        held=frozenset(record.held),
        layers=tuple(_layer(layer, directory, geometry, longer) for layer in record.layers),
        former=record.former,
        resizing=resizing,
        grown=record.grown,
    )


def _layer(record: LayerRecord, directory: Path, geometry: Geometry, longer: bool) -> Layer:
    path = directory / record.file
    if record.numbers is None:
        return IntervalLayer(record.last, Bitmap(path, geometry, longer=longer))
    numbers = _from_runs(record.numbers)
    array = LastChangeArray(path, geometry)
    array.check(len(numbers))
    return ArrayLayer(record.first, record.last, array, numbers)


def _to_runs(numbers: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
    counts = np.diff(starts, append=len(numbers))
    return tuple(zip(numbers[starts].tolist(), counts.tolist(), strict=True))


def _from_runs(runs: tuple[tuple[int, int], ...]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(first, first + count, dtype=np.int64) for first, count in runs])
