# SPDX-License-Identifier: MIT
"""A file that holds, for each block, the number of the interval in which it was last changed.

A value is a 16-bit index into a table of change numbers that its user keeps (0: not changed), so that an array
costs two bytes for each block however high the numbers are. It is divided into chunks, and only a chunk in which
something changed has a row of values: a file is `header | row of each chunk | newest of each chunk | rows`, each
part in whole pages.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.cbt import mapped_file
from blksnap_ublk.cbt.errors import HistoryDamaged
from blksnap_ublk.cbt.geometry import CHUNK_BLOCKS, PAGE, Geometry, page_ceil

INDEX_LIMIT = 65535
"""Change numbers that 16-bit indices can tell apart."""

_HEADER = struct.Struct("<16sQQI")
_MAGIC = b"bsu last change1"
_ROW_BYTES = 2 * CHUNK_BLOCKS
_CHECK_ROWS = 1024


class LastChangeArray:
    """The mapped file. Its owner stores values in an order that makes each moment between two stores a valid state."""

    def __init__(self, path: Path, geometry: Geometry) -> None:
        """Map an existing file. Raises HistoryDamaged if it is not an array of this geometry."""
        self.path = path
        self.geometry = geometry
        mapping = mapped_file.map_shared(path, None, writable=True)
        at_newest, at_rows = _layout(geometry)
        rows = (len(mapping) - at_rows) // _ROW_BYTES
        if rows < 0:
            raise HistoryDamaged(f"{path}: {len(mapping)} bytes are too short for an array")
        if _HEADER.unpack_from(mapping) != (_MAGIC, geometry.size, geometry.tracking_block, CHUNK_BLOCKS):
            raise HistoryDamaged(f"{path}: not a last-change array of this device")
        chunks = geometry.chunks
        self.row_of: NDArray[np.uint32] = np.frombuffer(mapping, "<u4", chunks, PAGE)
        """Per chunk: its row in `rows`, counted from 1; 0 if nothing in it changed."""
        self.newest: NDArray[np.uint16] = np.frombuffer(mapping, "<u2", chunks, at_newest)
        """Per chunk: no value in its row is higher."""
        self.rows: NDArray[np.uint16] = np.ndarray((rows, CHUNK_BLOCKS), "<u2", mapping, at_rows)
        """The values: shape (rows of the file when it was mapped, CHUNK_BLOCKS)."""
        if int(self.row_of.max()) > len(self.rows):
            raise HistoryDamaged(f"{path}: refers to values beyond its end")

    @classmethod
    def create(cls, path: Path, geometry: Geometry, rows: int) -> LastChangeArray:
        """Make a file in which nothing changed, with room for `rows` chunks. Raises OSError and leaves no file."""
        mapped_file.create(path, cls.bytes_for(geometry, rows))
        try:
            mapping = mapped_file.map_shared(path, None, writable=True)
            _HEADER.pack_into(mapping, 0, _MAGIC, geometry.size, geometry.tracking_block, CHUNK_BLOCKS)
            mapping.close()
            return cls(path, geometry)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    @staticmethod
    def bytes_for(geometry: Geometry, rows: int) -> int:
        """Length of the file of an array with room for `rows` chunks."""
        return _layout(geometry)[1] + rows * _ROW_BYTES

    @property
    def length(self) -> int:
        """Bytes of the file as mapped."""
        return self.bytes_for(self.geometry, len(self.rows))

    def has_row(self) -> NDArray[np.bool_]:
        """Which chunks have values: bool of shape (chunks,).

        Rows added to the file after it was mapped here are left out: who added them works from layers that the
        holder of this mapping still has.
        """
        return (self.row_of > 0) & (self.row_of <= len(self.rows))

    def with_room(self, chunks: NDArray[np.bool_]) -> LastChangeArray:
        """The same file, mapped again with free rows for all of `chunks` that have none. Raises OSError if full."""
        wanted = int(np.count_nonzero(chunks & (self.row_of == 0)))
        lacking = wanted - len(self._free_rows())
        if lacking <= 0:
            return self
        mapped_file.extend(self.path, self.length, self.bytes_for(self.geometry, len(self.rows) + lacking))
        return LastChangeArray(self.path, self.geometry)

    def give_rows(self, chunks: NDArray[np.bool_]) -> None:
        """Give each of `chunks` that has none a row of zeroes; `with_room` has been called for them."""
        needy = np.flatnonzero(chunks & (self.row_of == 0))
        self.row_of[needy] = self._free_rows()[: len(needy)] + 1

    def store(self, chunks: NDArray[np.intp], values: NDArray[np.uint16]) -> None:
        """Raise the rows of `chunks` to `values` (shape (len(chunks), CHUNK_BLOCKS)) where these are not 0."""
        self.newest[chunks] = np.maximum(self.newest[chunks], values.max(axis=1))
        where = self.row_of[chunks] - 1
        merged = self.rows[where]
        np.copyto(merged, values, where=values != 0)
        self.rows[where] = merged

    def used(self) -> NDArray[np.bool_]:
        """Which indices occur: bool of shape (INDEX_LIMIT + 1,)."""
        seen = np.zeros(INDEX_LIMIT + 1, np.bool_)
        for where in self._row_batches():
            seen[self.rows[where]] = True
        return seen

    def check(self, indices: int) -> None:
        """Raise HistoryDamaged if the parts of the file contradict each other or a value is above `indices`."""
        chunks = np.flatnonzero(self.row_of)
        where = self.row_of[chunks]
        if len(np.unique(where)) != len(where):
            raise HistoryDamaged(f"{self.path}: two chunks share their values")
        if int(self.newest.max()) > indices:
            raise HistoryDamaged(f"{self.path}: an index is beyond the table of change numbers")
        for part in range(0, len(chunks), _CHECK_ROWS):
            some = slice(part, part + _CHECK_ROWS)
            if (self.rows[where[some] - 1].max(axis=1) > self.newest[chunks[some]]).any():
                raise HistoryDamaged(f"{self.path}: the summary is lower than a value")

    def _free_rows(self) -> NDArray[np.uint32]:
        free = np.ones(len(self.rows) + 1, np.bool_)
        free[0] = False
        free[self.row_of] = False
        return (np.flatnonzero(free) - 1).astype(np.uint32)

    def _row_batches(self) -> list[NDArray[np.uint32]]:
        where = self.row_of[self.has_row()] - 1
        return [where[part : part + _CHECK_ROWS] for part in range(0, len(where), _CHECK_ROWS)]


def _layout(geometry: Geometry) -> tuple[int, int]:
    """Byte offsets of the summary and of the rows."""
    at_newest = PAGE + page_ceil(4 * geometry.chunks)
    return at_newest, at_newest + page_ceil(2 * geometry.chunks)
