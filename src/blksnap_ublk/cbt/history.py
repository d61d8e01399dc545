# SPDX-License-Identifier: MIT
"""The change history of one device: which tracking blocks changed in which interval between its snapshots.

Change number 0 is the moment of attach; each snapshot adds 1. Interval i is the time between snapshots i - 1 and i.
The interval that runs has the *active* bitmap, in which the process that does the I/O marks. At a switch that process
goes on with the *prepared* bitmap; the one it leaves becomes the youngest layer of the history. Queries can end at
each snapshot that is held, and at the last one taken; layers between such ends are folded into one.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.cbt import changes, fold, metadata, query, state
from blksnap_ublk.cbt.bitmap import Bitmap
from blksnap_ublk.cbt.changes import Changes, listed
from blksnap_ublk.cbt.cursor import Cursor
from blksnap_ublk.cbt.errors import HistoryDamaged, HistoryError, NoSuchSnapshot
from blksnap_ublk.cbt.fold import FoldPolicy
from blksnap_ublk.cbt.geometry import TRACKING_BLOCK_DEFAULT, Geometry
from blksnap_ublk.cbt.last_change import LastChangeArray
from blksnap_ublk.cbt.layer import ArrayLayer, IntervalLayer, Layer
from blksnap_ublk.cbt.metadata import FormerRecord, HistoryRecord
from blksnap_ublk.cbt.resizing import Enlarged, enlarge, shorten
from blksnap_ublk.cbt.state import State


class History:
    """The history of one device, in files of a directory of its own.

    After any call was broken off by the death of the process, `open` finds the state before it or after it.
    Queries may be asked from any thread at any time; calls that change something wait for one another.
    """

    def __init__(self, directory: Path, initial: State, policy: FoldPolicy) -> None:
        """Use `create` or `open`."""
        self._directory = directory
        self._state = initial
        self._policy = policy
        self._changing = threading.Lock()
        self._folding = threading.Lock()
        self._enlarged: Enlarged | None = None
        self._serial = max(metadata.serial(path.name) for path in initial.paths())

    @classmethod
    def create(
        cls,
        directory: Path,
        size: int,
        tracking_block: int = TRACKING_BLOCK_DEFAULT,
        *,
        generation: uuid.UUID | None = None,
        number: int = 0,
        held: Collection[int] = (),
        reason: str | None = None,
        former: tuple[uuid.UUID, str] | None = None,
        policy: FoldPolicy | None = None,
    ) -> History:
        """Begin a history of a device of `size` bytes, with a clear active bitmap, in an existing directory.

        A `reason` ("damaged", "unclean" ...) says why what was before is unknown: what is there is replaced, cursors
        up to `number`, the snapshots taken so far, answer "all" with it; those in `held` still are. Without a reason,
        a history that is there already is refused. `former`: another generation that was lost, and why: the answer to
        its cursors. Afterwards all writes are to be marked in `active`, none in a bitmap of before.

        Raises ValueError for a size that cannot be tracked, HistoryError, OSError.
        """
        geometry = Geometry(size, tracking_block)
        if reason is None and number:
            raise ValueError("a history that begins after snapshots needs a reason")
        if any(not 1 <= each <= number for each in held):
            raise ValueError("snapshots are held that were never taken")
        if reason is None and (directory / metadata.FILE).exists():
            raise HistoryError(f"{directory}: holds a change history already; open or remove it")
        metadata.remove(directory)
        active = Bitmap.create(directory / "bitmap.1", geometry)
        initial = State(
            generation=generation or uuid.uuid4(),
            number=number,
            known_since=0 if reason is None else number + 1,
            reason=reason,
            active=active,
            held=frozenset(held),
            former=None if former is None else FormerRecord(*former),
        )
        try:
            metadata.write(directory, state.to_record(initial))
        except Exception:
            active.path.unlink(missing_ok=True)
            raise
        return cls(directory, initial, policy or FoldPolicy())

    @classmethod
    def open(cls, directory: Path, *, policy: FoldPolicy | None = None) -> History:
        """Open what an earlier process left, and remove what it did not finish.

        If `prepared` is not None, the process that does the I/O knows whether it has switched: `commit` or `abort`.
        Raises HistoryDamaged, OSError.
        """
        record = metadata.read(directory)
        found = state.from_record(record, directory)
        metadata.sweep(directory, record.files())
        return cls(directory, found, policy or FoldPolicy())

    def remove(self) -> None:
        """Remove the files. Queries may go on; nothing else may be called afterwards."""
        with self._folding, self._changing:
            metadata.remove(self._directory)

    @contextmanager
    def resting(self) -> Iterator[tuple[Path, HistoryRecord]]:
        """Its directory and what its files are, while nothing but bits in bitmaps can change."""
        with self._folding, self._changing:
            yield self._directory, state.to_record(self._state)

    # What it is now

    @property
    def size(self) -> int:
        """Bytes of the device."""
        return self._state.geometry.size

    @property
    def tracking_block(self) -> int:
        """Bytes of a tracking block."""
        return self._state.geometry.tracking_block

    @property
    def blocks(self) -> int:
        """Tracking blocks of the device."""
        return self._state.geometry.blocks

    @property
    def generation(self) -> uuid.UUID:
        return self._state.generation

    @property
    def number(self) -> int:
        """The number of the last snapshot taken; 0 before the first."""
        return self._state.number

    @property
    def held(self) -> frozenset[int]:
        """The numbers of the snapshots that are held."""
        return self._state.held

    @property
    def reason(self) -> str | None:
        """Why the history does not reach back to the attach; None if it does."""
        return self._state.reason

    @property
    def active(self) -> Bitmap:
        """The bitmap of the interval that runs."""
        return self._state.active

    @property
    def prepared(self) -> Bitmap | None:
        """The bitmap of the next interval, if a take is under way."""
        return self._state.prepared

    @property
    def cursor(self) -> Cursor:
        """The cursor of the last snapshot taken."""
        current = self._state
        return Cursor(current.generation, current.number)

    @property
    def memory(self) -> int:
        """Bytes of all its files, metadata excepted: all of it is resident in a tmpfs."""
        current = self._state
        return sum(each.length for each in (*current.bitmaps(), *current.layers))

    def active_bytes(self) -> int:
        """Bytes of the blocks marked since the last snapshot, whole blocks, at this moment."""
        return min(self._state.active.count() * self.tracking_block, self.size)

    def bitmaps_around(self, number: int) -> tuple[Path, Path]:
        """The files in which writes to the image of the held snapshot `number` are marked: before it, and after it.

        The one after it is the active one while it is the last snapshot. Where that interval was lost and counts as
        changed anyway, the active one stands for it. While a take is under way the answer may be about to change.
        Raises NoSuchSnapshot, HistoryDamaged.
        """
        current = self._state
        if number not in current.held:
            raise NoSuchSnapshot(f"snapshot {number} is not held; held are {listed(current.held)}")
        return _marked_in(current, number), _marked_in(current, number + 1)

    # A take

    def prepare(self) -> Bitmap:
        """Make the clear bitmap that the next switch brings in; the same one again if it is there already.

        Raises OSError if there is no room, HistoryError while a resize is under way; then nothing has changed.
        """
        with self._changing:
            current = self._state
            if current.resizing is not None:
                raise HistoryError("a resize is under way: it must be ended first")
            if current.prepared is None:
                path = self._next_path("bitmap")
                try:
                    bitmap = Bitmap.create(path, self._state.geometry)
                    self._become(replace(current, prepared=bitmap))
                except Exception:
                    path.unlink(missing_ok=True)
                    raise
                return bitmap
            return current.prepared

    def commit(self, number: int) -> None:
        """Snapshot `number`, the next one, has been taken and is held: the switch to the prepared bitmap is done.

        Writes to its image are marked in the former active bitmap and in the prepared one, until `destroy`. Raises
        HistoryError if no take is under way or the number is not the next, OSError if there is no room; then it may be
        called again.
        """
        with self._changing:
            current = self._state
            if current.prepared is None:
                raise HistoryError(f"snapshot {number}: no take is under way")
            if number != current.number + 1:
                raise HistoryError(f"snapshot {number}: the next change number is {current.number + 1}")
            layers = current.layers
            if number > current.known_since:
                layers = (*layers, IntervalLayer(number, current.active))
            self._become(
                replace(
                    current,
                    number=number,
                    held=current.held | {number},
                    active=current.prepared,
                    prepared=None,
                    layers=layers,
                )
            )

    def abort(self) -> None:
        """The take ends without a switch: drop the prepared bitmap; nothing to do if there is none.

        Raises HistoryError if a mark stands in it: then it has been switched to, and only `commit` loses nothing.
        """
        with self._changing:
            current = self._state
            if current.prepared is None:
                return
            if current.prepared.touched().any():
                raise HistoryError("the prepared bitmap holds marks: the switch was done, the take must be committed")
            self._become(replace(current, prepared=None))

    # Afterwards

    def destroy(self, number: int) -> None:
        """Snapshot `number` is no longer held, and nobody writes to its image any more. Its cursor stays good.

        `fold` then gives memory back.

        Raises NoSuchSnapshot, OSError.
        """
        with self._changing:
            current = self._state
            if number not in current.held:
                raise NoSuchSnapshot(f"snapshot {number} is not held; held are {listed(current.held)}")
            self._become(replace(current, held=current.held - {number}))

    def lose(self, reason: str) -> None:
        """What was recorded can no longer be relied on: answer "all" with `reason` for everything up to now.

        Numbers go on, in another generation; snapshots stay held. The interval that runs is lost as well, so the
        first cursor that is good again is that of the next snapshot. Raises OSError.
        """
        with self._changing:
            current = self._state
            self._become(
                replace(
                    current,
                    generation=uuid.uuid4(),
                    known_since=current.number + 1,
                    reason=reason,
                    layers=(),
                    former=FormerRecord(current.generation, reason),
                )
            )

    def fold(self) -> bool:
        """Fold layers that no query can tell apart, where that saves memory; whether there were any.

        To be called after `destroy` and `commit`, from a thread that may take its time. Raises OSError if there is
        no room; then nothing is lost and it may be called again.
        """
        with self._folding:
            folded = False
            while (run := self._next_run()) and self._fold_run(run):
                folded = True
            return folded

    # Another size

    @property
    def resizing(self) -> Bitmap | None:
        """The active bitmap for another size, if a resize is under way."""
        return self._state.resizing

    def begin_resize(self, size: int) -> Bitmap:
        """Make the clear bitmap that becomes the active one when the device has `size` bytes, more than now.

        The process that does the I/O copies what is marked into it and goes on with it; then `end_resize`. Called
        again, it makes another one. Raises HistoryError, ValueError, OSError if there is no room; nothing has changed.
        """
        with self._folding, self._changing:
            current = self._state
            geometry = Geometry(size, self.tracking_block)
            if current.prepared is not None:
                raise HistoryError("a take is under way: it must be ended first")
            if size <= self.size:
                raise HistoryError(f"a device of {self.size} bytes cannot be resized to {size}")
            path = self._next_path("bitmap")
            try:
                bitmap = Bitmap.create(path, geometry)
                self._become(replace(current, resizing=bitmap))
            except Exception:
                path.unlink(missing_ok=True)
                raise
            try:
                self._enlarge(geometry)
            except Exception:
                self._become(replace(current, resizing=None))
                raise
            return bitmap

    def end_resize(self) -> None:
        """All is marked in the bitmap of `begin_resize` now, and what the device has grown by is marked as well.

        Raises HistoryError, OSError; then it may be called again.
        """
        with self._folding, self._changing:
            current = self._state
            if current.resizing is None:
                raise HistoryError("no resize is under way")
            layers = self._enlarge(current.resizing.geometry)
            grown = current.grown
            if not grown or grown[-1][0] != current.number:
                grown = (*grown, (current.number, self.size))
            self._become(replace(current, active=current.resizing, resizing=None, layers=layers, grown=grown))
            self._enlarged = None

    def abandon_resize(self) -> None:
        """Nothing is marked in the bitmap of `begin_resize`, which is dropped. Nothing to do if there is none.

        Raises OSError; then it may be called again.
        """
        with self._folding, self._changing:
            if self._state.resizing is not None:
                self._drop_enlarged()
                shorten(self._state.layers)
                self._become(replace(self._state, resizing=None))

    # Queries

    def changes(self, since: Cursor | None, until: int | None = None) -> Changes:
        """What changed after `since` (None: since tracking began) up to snapshot `until` (None: the last one taken).

        Says "all", with a reason, for a cursor of another generation ("new-generation", or why the former one was
        lost), one younger than `until` ("future"), and one older than the history. Raises NoSuchSnapshot.
        """
        return changes.changes(self._state, since, until)

    def changed_blocks(self, since: Cursor | None, until: int | None = None) -> NDArray[np.bool_]:
        """The same as a bool for each tracking block, shape (blocks,); all True where `changes` says "all"."""
        return changes.changed_blocks(self._state, since, until)

    def last_change(self) -> NDArray[np.uint32]:
        """For each block the interval it was last changed in, as of the last snapshot taken: shape (blocks,).

        0 if it was not changed. After a loss no block has less than the number of the first snapshot whose cursor is
        good again (or of the last one taken), so that a comparison with any older number finds them all. Where an
        array ran out of numbers, an old one may be higher than it was, never lower.
        """
        current = self._state
        return query.last_numbers(current.layers, min(current.known_since, current.number), current.geometry)

    # How it changes

    def _next_path(self, kind: str) -> Path:
        self._serial += 1
        return self._directory / f"{kind}.{self._serial}"

    def _become(self, following: State) -> None:
        """Take another state: on disk, then for queries; then remove the files that it does without.

        Raises OSError, and then the state is the former one. A file that cannot be removed is left to `open`.
        """
        metadata.write(self._directory, state.to_record(following))
        former, self._state = self._state, following
        for path in former.paths() - following.paths():
            with suppress(OSError):
                path.unlink()

    def _enlarge(self, geometry: Geometry) -> tuple[Layer, ...]:
        """The layers for a larger device; made once, so that the second call needs no room. Raises OSError."""
        layers = self._state.layers
        made = self._enlarged
        if made is None or made.of is not layers or made.geometry != geometry:
            self._drop_enlarged()
            path = partial(self._next_path, "array")
            made = self._enlarged = Enlarged(layers, geometry, enlarge(layers, geometry, path))
        return made.layers

    def _drop_enlarged(self) -> None:
        if self._enlarged is not None:
            for path in {layer.path for layer in self._enlarged.layers} - self._state.paths():
                path.unlink(missing_ok=True)
        self._enlarged = None

    def _next_run(self) -> tuple[Layer, ...] | None:
        current = self._state
        for run in fold.runs(current.layers, _ends(current)):
            if fold.worth_folding(run, current.geometry, self._policy):
                return run
        return None

    def _fold_run(self, run: tuple[Layer, ...]) -> bool:
        """Fold into the array that the run begins with, otherwise into another one. False if the history was lost."""
        oldest, sources = run[0], run[1:]
        numbers = fold.numbers_of(run, self._policy.number_limit)
        if isinstance(oldest, ArrayLayer) and fold.can_take(oldest, numbers):
            array = oldest.array.with_room(fold.touched(sources))
            taking = ArrayLayer(oldest.first, oldest.last, array, numbers)
            if not self._exchange((oldest,), taking):
                return False
            fold.store(sources, array, numbers)
            return self._exchange((taking, *sources), ArrayLayer(taking.first, run[-1].last, array, numbers))
        path = self._next_path("array")
        try:
            array = LastChangeArray.create(path, self._state.geometry, int(np.count_nonzero(fold.touched(run))))
            fold.store(run, array, numbers)
            if self._exchange(run, ArrayLayer(oldest.first, run[-1].last, array, numbers)):
                return True
        except Exception:
            path.unlink(missing_ok=True)
            raise
        path.unlink()
        return False

    def _exchange(self, old: Sequence[Layer], new: Layer) -> bool:
        """Put a layer in the place of others; False if these are gone because the history was lost meanwhile."""
        with self._changing:
            layers = self._state.layers
            places = [place for place, layer in enumerate(layers) if layer is old[0]]
            if not places:
                return False
            at = places[0]
            self._become(replace(self._state, layers=(*layers[:at], new, *layers[at + len(old) :])))
            return True


def _ends(current: State) -> frozenset[int]:
    """Where runs of layers end: at each number up to which may be asked, and around the bitmaps of the intervals before
    and after a held snapshot, in which writes to its image are marked.
    """
    marked = {number + near for number in current.held for near in (-1, 1)}
    return current.held | {current.number} | marked


def _marked_in(current: State, interval: int) -> Path:
    """Where a write to an image is marked as a change in an interval: its bitmap, or any if all of it has changed."""
    if current.known_since < interval <= current.number:
        for layer in current.layers:
            if layer.last == interval and isinstance(layer, IntervalLayer):
                return layer.path
        raise HistoryDamaged(f"interval {interval} has been folded, although a snapshot next to it is held")
    return current.active.path
