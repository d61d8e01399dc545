# SPDX-License-Identifier: MIT
"""Layers for a device that has grown. What it has grown by changed in none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk.cbt import mapped_file
from blksnap_ublk.cbt.bitmap import Bitmap
from blksnap_ublk.cbt.geometry import Geometry
from blksnap_ublk.cbt.last_change import LastChangeArray
from blksnap_ublk.cbt.layer import ArrayLayer, IntervalLayer, Layer


@dataclass(frozen=True, eq=False)
class Enlarged:
    """Layers that stand ready for a larger geometry, and those that they were made of."""

    of: tuple[Layer, ...]
    geometry: Geometry
    layers: tuple[Layer, ...]


def enlarge(layers: tuple[Layer, ...], geometry: Geometry, next_path: Callable[[], Path]) -> tuple[Layer, ...]:
    """The same layers with a larger geometry.

    A bitmap stays in its file, in which others may mark: that becomes longer. An array, whose parts move, becomes
    another file. Raises OSError, and leaves no other file then.
    """
    made: list[Layer] = []
    try:
        for layer in layers:
            made.append(_enlarged(layer, geometry, next_path))
    except BaseException:
        for layer in made:
            if isinstance(layer, ArrayLayer):
                layer.path.unlink(missing_ok=True)
        shorten(layers)
        raise
    return tuple(made)


def shorten(layers: Iterable[Layer]) -> None:
    """Takes back what `enlarge` did to the files of these layers. Raises OSError."""
    for layer in layers:
        if isinstance(layer, IntervalLayer):
            mapped_file.shorten(layer.path, layer.length)


def _enlarged(layer: Layer, geometry: Geometry, next_path: Callable[[], Path]) -> Layer:
    if isinstance(layer, IntervalLayer):
        mapped_file.extend(layer.path, layer.length, geometry.bitmap_bytes)
        mapped_file.shorten(layer.path, geometry.bitmap_bytes)  # an attempt before this one may have wanted more
        return IntervalLayer(layer.last, Bitmap(layer.path, geometry))
    former = layer.array
    array = LastChangeArray.create(next_path(), geometry, len(former.rows))
    array.rows[:] = former.rows
    array.newest[: len(former.newest)] = former.newest
    array.row_of[: len(former.row_of)] = former.row_of
    return ArrayLayer(layer.first, layer.last, array, layer.numbers)
