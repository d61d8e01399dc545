# SPDX-License-Identifier: MIT
"""A saved change map is never left standing as good when its origin is about to be written to."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from blksnap_ublk.cbt import Cursor, History, saved_file
from blksnap_ublk.errors import Failed
from blksnap_ublk.snapshot.saved_changes import Recall, begin, mark_in_use

SIZE = 1 << 20


def saved(folder: Path) -> tuple[Path, History]:
    (folder / "before").mkdir()
    history = History.create(folder / "before", SIZE)
    history.prepare()
    history.commit(1)
    path = folder / "saved" / "file.changes"
    path.parent.mkdir()
    saved_file.save(history, path, b"null")
    return path, history


def unwritable(path: Path) -> Path:
    """The same place in a directory that cannot hold it, for root either."""
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.write_text("a file")
    return path


def test_mark_comes_before_the_first_write_or_there_is_none(tmp_path: Path) -> None:
    path, history = saved(tmp_path)
    recalled = Recall(path, there=True, saved=saved_file.read(path))
    unwritable(path)
    with pytest.raises(Failed, match=str(path)):
        mark_in_use(recalled, history.generation)


def test_nothing_to_mark_and_no_way_to_is_a_warning(tmp_path: Path) -> None:
    path, history = saved(tmp_path)
    unwritable(path)
    (warning,) = mark_in_use(Recall(path), history.generation)
    assert str(path) in warning
    assert mark_in_use(Recall(), history.generation) == []


def test_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.changes"
    generation = uuid4()
    assert mark_in_use(Recall(path), generation) == []
    found = saved_file.read(path)
    assert found is not None
    assert (found.generation, found.history) == (generation, None)
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_restored(tmp_path: Path) -> None:
    path, history = saved(tmp_path)
    recalled = Recall(path, there=True, saved=saved_file.read(path))
    assert recalled.tracking_block == 64 << 10
    (tmp_path / "after").mkdir()
    found, text = begin(recalled, tmp_path / "after", SIZE, 64 << 10)
    assert text is None
    assert found.cursor == history.cursor


def test_damaged_data_is_found_before_it_is_used(tmp_path: Path) -> None:
    """The head is whole; what it tells of is not."""
    path, history = saved(tmp_path)
    recalled = Recall(path, there=True, saved=saved_file.read(path))
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 0xFF]) + whole[1:])
    (tmp_path / "after").mkdir()
    found, text = begin(recalled, tmp_path / "after", SIZE, 64 << 10)
    assert text is not None
    assert found.generation != history.generation
    found.prepare()
    found.commit(1)
    answer = found.changes(Cursor(history.generation, 1))
    assert (answer.all, answer.reason) == (True, "damaged")


def test_reason_of_a_former_generation(tmp_path: Path) -> None:
    former = uuid4()
    found, text = begin(Recall(former=(former, "unclean"), text="why"), tmp_path, SIZE, 64 << 10)
    assert text == "why"
    found.prepare()
    found.commit(1)
    assert found.changes(Cursor(former, 3)).reason == "unclean"
    assert not found.changes(None).all
