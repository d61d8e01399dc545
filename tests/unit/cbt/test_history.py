# SPDX-License-Identifier: MIT
"""Edges of the device, refused calls, and what a take leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from blksnap_ublk.cbt import Bitmap, Cursor, FoldPolicy, History, HistoryError, NoSuchSnapshot
from blksnap_ublk.cbt.layer import ArrayLayer
from tests.unit.cbt.model import expected_files, files_of, mark

KIB = 1 << 10


def take(history: History, changed: Iterable[int] = ()) -> int:
    mark(history.active, changed)
    history.prepare()
    history.commit(history.number + 1)
    return history.number


def ranges(history: History, since: int | None, until: int | None = None) -> list[list[int]]:
    cursor = None if since is None else Cursor(history.generation, since)
    answer: list[list[int]] = history.changes(cursor, until).ranges.tolist()
    return answer


def test_bitmaps_around_a_held_snapshot_outlive_the_process_and_every_fold(tmp_path: Path) -> None:
    history = History.create(tmp_path, 1 << 20, policy=FoldPolicy(always=True))
    bitmaps = [history.active.path]
    for _ in range(6):
        take(history)
        bitmaps.append(history.active.path)
    for number in (1, 2, 4, 5):
        history.destroy(number)
        history.fold()
    history = History.open(tmp_path)
    assert history.bitmaps_around(3) == (bitmaps[2], bitmaps[3])
    assert history.bitmaps_around(6) == (bitmaps[5], history.active.path)
    history.prepare()
    assert history.bitmaps_around(6) == (bitmaps[5], bitmaps[6])
    for number in (0, 2, 7):
        with pytest.raises(NoSuchSnapshot):
            history.bitmaps_around(number)


def test_bitmaps_around_a_snapshot_whose_history_was_lost(tmp_path: Path) -> None:
    """Whatever is written to its image counts as changed anyway, until a snapshot whose cursor is good again."""
    History.create(tmp_path, 1 << 20)
    history = History.create(tmp_path, 1 << 20, number=3, held={2, 3}, reason="damaged")
    lost = history.active
    for number in (2, 3):
        assert history.bitmaps_around(number) == (lost.path, lost.path)
    assert take(history) == 4
    assert history.bitmaps_around(4) == (history.active.path, history.active.path)
    assert take(history) == 5
    for number in (2, 3, 4, 5):
        for path in history.bitmaps_around(number):
            mark(Bitmap(path, history.active.geometry), [1])
    assert history.changes(Cursor(history.generation, 3)).reason == "damaged"
    assert ranges(history, 4) == [[64 * KIB, 64 * KIB]]
    for number in (2, 3, 4):
        history.destroy(number)
    assert history.held == {5}
    with pytest.raises(ValueError, match="never taken"):
        History.create(tmp_path, 1 << 20, number=3, held={4}, reason="damaged")


@pytest.mark.parametrize("size", [1, 512, 64 * KIB - 1, 64 * KIB])
def test_device_of_one_block(tmp_path: Path, size: int) -> None:
    history = History.create(tmp_path, size)
    assert history.blocks == 1
    take(history)
    assert ranges(history, None) == []
    take(history, [0])
    assert ranges(history, None) == [[0, size]]
    assert ranges(history, 1) == [[0, size]]
    assert history.changes(None).changed_bytes == size
    assert history.last_change().tolist() == [2]


def test_writes_to_held_images_are_changes_before_and_after_them(tmp_path: Path) -> None:
    """Also after somebody has asked, and after younger and older snapshots have gone and were folded."""
    history = History.create(tmp_path, 1 << 20, policy=FoldPolicy(always=True))
    bitmaps = []
    for _ in range(5):
        bitmaps.append(history.active)
        take(history)
    assert ranges(history, None) == []
    for number in (1, 2, 4, 5):
        history.destroy(number)
        history.fold()
    mark(bitmaps[2], [7])
    mark(bitmaps[3], [7])
    block = [[7 * 64 * KIB, 64 * KIB]]
    assert ranges(history, 2, 3) == ranges(history, 3) == block
    assert ranges(history, 4) == []
    history.destroy(3)
    history.fold()
    assert len(history._state.layers) == 1
    assert ranges(history, 2) == ranges(history, 3) == block
    assert ranges(history, 4) == []


def test_last_block_is_clipped_to_the_device(tmp_path: Path) -> None:
    size = 3 * 64 * KIB + 512
    history = History.create(tmp_path, size)
    take(history, [3])
    assert ranges(history, None) == [[3 * 64 * KIB, 512]]
    take(history, [2, 3])
    assert ranges(history, 1) == [[2 * 64 * KIB, 64 * KIB + 512]]


def test_all_blocks_are_one_range(tmp_path: Path) -> None:
    size = 10_000 * 4 * KIB - 100
    history = History.create(tmp_path, size, 4 * KIB)
    take(history, range(10_000))
    changes = history.changes(None)
    assert changes.ranges.tolist() == [[0, size]]
    assert (changes.all, changes.reason, changes.changed_bytes) == (False, None, size)
    assert history.changed_blocks(None).all()


def test_nothing_changed_since_its_own_cursor(tmp_path: Path) -> None:
    history = History.create(tmp_path, 1 << 20)
    take(history, [1, 2])
    changes = history.changes(history.cursor)
    assert (changes.all, changes.changed_bytes, len(changes.ranges)) == (False, 0, 0)


def test_bits_beyond_the_device_are_not_reported(tmp_path: Path) -> None:
    history = History.create(tmp_path, 10 * 64 * KIB)
    assert take(history, [9, 10, 63, 64, 4095, 4096, 32767]) == 1
    assert ranges(history, None) == [[9 * 64 * KIB, 64 * KIB]]
    mark(history.active, [10, 4096])
    assert history.active_bytes() == 0


def test_bitmap_is_the_layout_that_the_marking_process_uses(tmp_path: Path) -> None:
    """Block b: bit b % 64 of the little-endian word b // 64; whole pages, allocated, 0600."""
    history = History.create(tmp_path, 40_000 * 4 * KIB, 4 * KIB)
    mark(history.active, [0, 70, 39_999])
    content = np.frombuffer(history.active.path.read_bytes(), "<u8")
    assert [(int(word), int(content[word])) for word in np.flatnonzero(content)] == [
        (0, 1),
        (1, 1 << 6),
        (39_999 // 64, 1 << 39_999 % 64),
    ]
    status = os.stat(history.active.path)
    assert status.st_size == history.active.length == 8192
    assert status.st_blocks * 512 >= status.st_size
    assert status.st_mode & 0o777 == 0o600
    assert not history.active.rows.flags.writeable
    assert history.active_bytes() == 3 * 4 * KIB


def test_cursor_of_another_generation_and_from_the_future(tmp_path: Path) -> None:
    history = History.create(tmp_path, 1 << 20)
    take(history, [1])
    take(history, [2])
    for cursor, until, reason in [
        (Cursor(uuid4(), 1), None, "new-generation"),
        (Cursor(uuid4(), 99), None, "new-generation"),
        (Cursor(history.generation, 3), None, "future"),
        (Cursor(history.generation, 2), 1, "future"),
    ]:
        changes = history.changes(cursor, until)
        assert (changes.all, changes.reason, changes.changed_bytes) == (True, reason, 1 << 20)
        assert changes.ranges.tolist() == [[0, 1 << 20]]
        assert history.changed_blocks(cursor, until).all()


def test_until_is_a_held_snapshot_or_the_last_one_taken(tmp_path: Path) -> None:
    history = History.create(tmp_path, 1 << 20)
    with pytest.raises(NoSuchSnapshot, match="no snapshot has been taken yet"):
        history.changes(None)
    for _ in range(4):
        take(history)
    history.destroy(1)
    history.destroy(4)
    for until in (2, 3, 4):
        history.changes(None, until)
    for until in (0, 1, 5):
        with pytest.raises(NoSuchSnapshot, match=rf"snapshot {until} is not held; .*\(2, 3\).*\(4\)"):
            history.changes(None, until)
    take(history)
    with pytest.raises(NoSuchSnapshot, match="snapshot 4 is not held"):
        history.changes(None, 4)


def test_calls_in_the_wrong_order_are_refused_and_change_nothing(tmp_path: Path) -> None:
    history = History.create(tmp_path, 1 << 20)
    with pytest.raises(HistoryError, match="no take is under way"):
        history.commit(1)
    history.prepare()
    for number in (0, 2):
        with pytest.raises(HistoryError, match="next change number is 1"):
            history.commit(number)
    history.commit(1)
    with pytest.raises(NoSuchSnapshot, match="snapshot 2 is not held; held are 1"):
        history.destroy(2)
    history.destroy(1)
    with pytest.raises(NoSuchSnapshot, match="held are none"):
        history.destroy(1)
    assert (history.number, history.held, history.prepared) == (1, frozenset(), None)


def test_abort_refuses_to_drop_marks(tmp_path: Path) -> None:
    """A mark in the prepared bitmap says that the switch was done."""
    history = History.create(tmp_path, 1 << 20)
    prepared = history.prepare()
    mark(prepared, [5])
    with pytest.raises(HistoryError, match="must be committed"):
        History.open(tmp_path).abort()
    history.commit(1)
    take(history)
    assert ranges(history, 1) == [[5 * 64 * KIB, 64 * KIB]]


def test_history_begun_after_a_loss_answers_all_with_the_reason(tmp_path: Path) -> None:
    former = History.create(tmp_path, 1 << 20)
    take(former, [1])
    cursor = former.cursor
    former.prepare()
    with pytest.raises(HistoryError, match="holds a change history already"):
        History.create(tmp_path, 1 << 20)
    with pytest.raises(ValueError, match="needs a reason"):
        History.create(tmp_path, 1 << 20, number=4)
    history = History.create(tmp_path, 1 << 20, reason="damaged", number=1)
    assert files_of(tmp_path) == expected_files(history)
    assert history.changes(cursor).reason == "new-generation"
    assert history.changes(history.cursor).reason == "damaged"
    assert history.changes(None).reason == "damaged"
    take(history, [2])
    assert history.changes(Cursor(history.generation, 1)).reason == "damaged"
    assert history.changes(None).reason == "damaged"
    known = history.cursor
    take(history, [3])
    assert ranges(history, known.number) == [[3 * 64 * KIB, 64 * KIB]]
    assert history.last_change().tolist() == [2] * 3 + [3] + [2] * 12


def test_given_generation_is_kept(tmp_path: Path) -> None:
    generation = uuid4()
    assert History.create(tmp_path, 1 << 20, generation=generation).generation == generation
    assert History.open(tmp_path).generation == generation


def test_loss_during_a_take(tmp_path: Path) -> None:
    """The take may end either way, and what was marked before and after it is "all"."""
    history = History.create(tmp_path, 1 << 20)
    take(history, [1])
    mark(history.active, [2])
    history.prepare()
    history.lose("unclean")
    history.commit(2)
    assert history.held == {1, 2}
    assert history.changes(None, 1).reason == "unclean"
    assert history.changes(None, 2).reason == "unclean"
    assert ranges(history, 2) == []
    history.destroy(1)
    take(history, [4])
    assert ranges(History.open(tmp_path), 2) == [[4 * 64 * KIB, 64 * KIB]]


def test_remove_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "map.1").write_text("of somebody else")
    history = History.create(tmp_path, 1 << 20)
    take(history, [1])
    history.prepare()
    history.remove()
    assert os.listdir(tmp_path) == ["map.1"]


@pytest.mark.parametrize("size", [0, -1, 1 << 63])
def test_sizes_that_cannot_be_tracked(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match="cannot be tracked"):
        History.create(tmp_path, size)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("tracking_block", [0, 2 * KIB, 65 * KIB, 128 << 20])
def test_tracking_blocks_that_are_refused(tmp_path: Path, tracking_block: int) -> None:
    with pytest.raises(ValueError, match="power of two from 4 KiB to 64 MiB"):
        History.create(tmp_path, 1 << 20, tracking_block)


def test_scattered_changes_fold_into_a_small_array_and_dense_ones_stay_bitmaps(tmp_path: Path) -> None:
    """Memory is never more after a fold, and at most that of 16 bitmaps and one more for each block."""
    blocks = 64 * 4096
    history = History.create(tmp_path, blocks * 4 * KIB, 4 * KIB)
    bitmap = blocks // 8
    for number in range(1, 6):
        take(history, [number])
        history.destroy(number)
        history.fold()
    assert history.memory <= 3 * bitmap
    full = range(blocks)
    for _ in range(40):
        number = take(history, full)
        history.destroy(number)
        before = history.memory
        history.fold()
        assert history.memory <= before
        assert history.memory <= 20 * bitmap
    assert ranges(history, history.number - 1) == [[0, blocks * 4 * KIB]]


def test_more_numbers_than_16_bits(tmp_path: Path) -> None:
    """A table that is full drops numbers no block refers to, and every answer stays exact."""
    history = History.create(tmp_path, 64 << 20, policy=FoldPolicy(always=True, number_limit=70))
    for number in range(1, 301):
        take(history, [number % 50])
        history.destroy(number)
        history.fold()
    last = {number % 50: number for number in range(1, 301)}
    assert history.last_change()[:50].tolist() == [last[block] for block in range(50)]
    assert ranges(history, 290) == [[0, 64 * KIB], [41 * 64 * KIB, 9 * 64 * KIB]]
    (layer,) = history._state.layers
    assert isinstance(layer, ArrayLayer)
    assert len(layer.numbers) <= 70


def test_full_table_where_nothing_changed(tmp_path: Path) -> None:
    """Two arrays without a change, whose numbers do not fit into one table, become one that opens."""
    history = History.create(tmp_path, 1 << 20, policy=FoldPolicy(always=True, number_limit=1))
    for _ in range(8):
        take(history)
    for number in (1, 2, 3, 6, 7, 8, 4, 5):
        history.destroy(number)
        history.fold()
    history = History.open(tmp_path, policy=FoldPolicy(always=True, number_limit=1))
    assert len(history._state.layers) == 1
    assert ranges(history, None) == []


def test_collapsed_numbers_stay_close(tmp_path: Path) -> None:
    """Where numbers in use do not fit, the newest ones stay exact and old ones only rise."""
    history = History.create(tmp_path, 64 << 20, policy=FoldPolicy(always=True, number_limit=64))
    for number in range(1, 501):
        take(history, [number])
        history.destroy(number)
        history.fold()
    last = history.last_change()[1:501].astype(int)
    true = np.arange(1, 501)
    assert (last >= true).all()
    assert (last[-25:] == true[-25:]).all()
    assert (np.diff(last) >= 0).all()
    assert len(np.unique(last)) >= 50


def test_prepared_bitmap_is_clear_and_has_its_room(tmp_path: Path) -> None:
    history = History.create(tmp_path, 1 << 30)
    take(history, range(100))
    prepared = history.prepare()
    assert isinstance(prepared, Bitmap)
    assert prepared.count() == 0
    status = os.stat(prepared.path)
    assert status.st_blocks * 512 >= status.st_size == prepared.length
