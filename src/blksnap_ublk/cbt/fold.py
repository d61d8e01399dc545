# SPDX-License-Identifier: MIT
"""Folding: several layers that nobody can tell apart any more become one.

A run is a stretch of layers with no snapshot at which a query could end in its midst. Bitmaps cost one bit for each
block of the device, an array 16 bits for each block of the chunks in which something changed: a run is folded when
that needs no more memory than the layers do. So a few scattered changes become an array at once, while up to 16
bitmaps of a device written all over are kept as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.cbt.geometry import Geometry
from blksnap_ublk.cbt.last_change import INDEX_LIMIT, LastChangeArray
from blksnap_ublk.cbt.layer import ArrayLayer, Layer

_BATCH = 256

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FoldPolicy:
    """When to fold, and how many change numbers an array may tell apart (1 to 65535)."""

    always: bool = False
    number_limit: int = INDEX_LIMIT


def runs(layers: Sequence[Layer], boundaries: Collection[int]) -> Iterator[tuple[Layer, ...]]:
    """Split layers into runs: each ends at one of `boundaries`, the numbers up to which queries may ask."""
    run: list[Layer] = []
    for layer in layers:
        run.append(layer)
        if layer.last in boundaries:
            yield tuple(run)
            run.clear()


def worth_folding(run: Sequence[Layer], geometry: Geometry, policy: FoldPolicy) -> bool:
    """Whether the run as one array needs no more memory than it does now."""
    if len(run) < 2:
        return False
    after = LastChangeArray.bytes_for(geometry, int(np.count_nonzero(touched(run))))
    return policy.always or after <= sum(layer.length for layer in run)


def touched(layers: Sequence[Layer]) -> NDArray[np.bool_]:
    """Which chunks anything changed in: bool of shape (chunks,)."""
    together: NDArray[np.bool_] = np.logical_or.reduce([layer.touched(0) for layer in layers])
    return together


def numbers_of(run: Sequence[Layer], limit: int) -> Numbers:
    """The table of change numbers of the folded run, ascending, at least one and at most `limit` of them.

    Numbers that no block refers to any more are left out when they do not fit. If those in use do not fit either,
    a choice of old ones is left out, whose blocks then count as changed in the next interval that is kept.
    """
    every = _union(layer.numbers for layer in run)
    if len(every) <= limit:
        return every
    used = _union((*(_used(layer) for layer in run), every[-1:]))
    if len(used) <= limit:
        return used
    kept = max(1, limit * 7 // 8)
    newest = kept // 2
    older = used[: len(used) - newest]
    chosen = older[np.linspace(len(older) - 1, 0, kept - newest).astype(np.intp)]
    return np.union1d(chosen, used[len(older) :])


def can_take(layer: Layer, numbers: Numbers) -> bool:
    """Whether a layer is an array whose indices keep their meaning in the table `numbers`."""
    return isinstance(layer, ArrayLayer) and np.array_equal(layer.numbers, numbers[: len(layer.numbers)])


def store(sources: Sequence[Layer], array: LastChangeArray, numbers: Numbers) -> None:
    """Store layers, oldest first, in an array with room for them and the table `numbers`.

    It may be broken off anywhere and begun again. Until the sources are dropped, any part of it is right.
    """
    array.give_rows(touched(sources))
    for layer in sources:
        positions = np.searchsorted(numbers, layer.numbers).clip(max=len(numbers) - 1)
        of_number = (positions + 1).astype(np.uint16)
        changed = np.flatnonzero(layer.touched(0))
        for part in range(0, len(changed), _BATCH):
            chunks = changed[part : part + _BATCH]
            array.store(chunks, layer.indices(chunks, of_number))


def _used(layer: Layer) -> Numbers:
    if isinstance(layer, ArrayLayer):
        return layer.numbers[layer.array.used()[1 : len(layer.numbers) + 1]]
    return layer.numbers


def _union(tables: Iterable[Numbers]) -> Numbers:
    return np.unique(np.concatenate(list(tables)))
