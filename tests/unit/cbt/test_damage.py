# SPDX-License-Identifier: MIT
"""Files that are torn, missing or foreign are found out when the history is opened; it never answers from them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from blksnap_ublk.cbt import FoldPolicy, History, HistoryDamaged, metadata
from tests.unit.cbt.model import mark

SIZE = 64 << 20
BLOCK = 64 << 10


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A history with an array, two bitmaps in layers, an active and a prepared one."""
    history = History.create(tmp_path, SIZE, BLOCK, policy=FoldPolicy(always=True))
    for number in range(1, 5):
        mark(history.active, [number])
        history.prepare()
        history.commit(number)
    history.destroy(1)
    history.destroy(2)
    history.fold()
    history.prepare()
    kinds = sorted(path.name.partition(".")[0] for path in tmp_path.iterdir())
    assert kinds == ["array", *["bitmap"] * 4, "history"]
    return tmp_path


def array_file(directory: Path) -> Path:
    (path,) = directory.glob("array.*")
    return path


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_metadata_cut_at_every_byte(directory: Path) -> None:
    path = directory / "history.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(HistoryDamaged, match=r"history\.json"):
            History.open(directory)
    path.write_bytes(whole)
    History.open(directory)


def test_metadata_with_each_bit_flipped(directory: Path) -> None:
    path = directory / "history.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with pytest.raises(HistoryDamaged):
            History.open(directory)


def test_metadata_of_another_version_or_program(directory: Path) -> None:
    path = directory / "history.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"version":1', b'"version":2'))
    with pytest.raises(HistoryDamaged, match="version 2 of the format, this program knows 1"):
        History.open(directory)
    for foreign in (b"{}", b"[]", b"null", b'{"format":"something else","version":1}', b"\xff\x00", b"[" * 100_000):
        path.write_bytes(foreign)
        with pytest.raises(HistoryDamaged):
            History.open(directory)


@pytest.mark.parametrize("kind", ["history.json", "bitmap.*", "array.*"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(Path.unlink, id="missing"),
        pytest.param(lambda path: os.truncate(path, 0), id="empty"),
        pytest.param(lambda path: os.truncate(path, 100), id="cut"),
        pytest.param(become_directory, id="directory"),
        pytest.param(become_fifo, id="fifo"),
    ],
)
def test_each_file_missing_or_of_the_wrong_kind(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, damage: Callable[[Path], object]
) -> None:
    for path in list(directory.glob(kind)):
        copy = tmp_path_factory.mktemp("copy")
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        damage(copy / path.name)
        with pytest.raises(HistoryDamaged, match=path.name):
            History.open(copy)


def test_bitmap_of_another_size(directory: Path) -> None:
    for path in directory.glob("bitmap.*"):
        os.truncate(path, 8192)
        with pytest.raises(HistoryDamaged, match="8192 bytes long, expected 4096"):
            History.open(directory)
        os.truncate(path, 4096)
    History.open(directory)


def test_array_of_another_device(directory: Path) -> None:
    overwrite(array_file(directory), 16, (SIZE + 512).to_bytes(8, "little"))
    with pytest.raises(HistoryDamaged, match="not a last-change array of this device"):
        History.open(directory)


@pytest.mark.parametrize(
    ("offset", "content", "why"),
    [
        pytest.param(0, b"x", "not a last-change array", id="magic"),
        pytest.param(4096, b"\x02", "beyond its end", id="row"),
        pytest.param(8192, b"\x07", "beyond the table", id="summary too high"),
        pytest.param(8192, b"\x01", "summary is lower", id="summary too low"),
        pytest.param(12288 + 40, b"\x03", "summary is lower", id="value"),
    ],
)
def test_array_that_contradicts_itself(directory: Path, offset: int, content: bytes, why: str) -> None:
    overwrite(array_file(directory), offset, content)
    with pytest.raises(HistoryDamaged, match=why):
        History.open(directory)


def test_array_whose_chunks_share_values(tmp_path: Path) -> None:
    history = History.create(tmp_path, 2 * 4096 * 4096, 4096, policy=FoldPolicy(always=True))
    for number in (1, 2):
        mark(history.active, [1, 5000])
        history.prepare()
        history.commit(number)
    history.destroy(1)
    history.destroy(2)
    history.fold()
    overwrite(array_file(tmp_path), 4096, b"\x02")
    with pytest.raises(HistoryDamaged, match="two chunks share"):
        History.open(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"number": 5},
        {"number": 3},
        {"held": [2, 3, 9]},
        {"held": [3, 2]},
        {"held": [0]},
        {"known_since": 1},
        {"known_since": 9, "reason": "unclean"},
        {"known_since": -1, "reason": "unclean"},
        {"reason": "unclean"},
        {"size": 0},
        {"tracking_block": 5000},
        {"active": "../elsewhere"},
        {"active": "bitmap.2"},
        {"prepared": "history.json"},
        {"layers": []},
        {"generation": "none"},
    ],
    ids=str,
)
def test_metadata_that_contradicts_itself(directory: Path, changed: dict[str, object]) -> None:
    """With a checksum that is right, so that only the check of the contents can find it."""
    envelope = msgspec.json.decode((directory / "history.json").read_bytes())
    history = msgspec.json.encode(envelope["history"] | changed)
    envelope |= {"history": msgspec.Raw(history), "checksum": metadata._checksum(history)}
    (directory / "history.json").write_bytes(msgspec.json.encode(envelope))
    with pytest.raises(HistoryDamaged):
        History.open(directory)


def test_left_overs_are_swept_and_other_files_are_not(directory: Path) -> None:
    before = {path.name for path in directory.iterdir()}
    for name in ("bitmap.99", "array.98", "history.json.part"):
        (directory / name).write_bytes(b"left over")
    for name in ("bitmap.99.saved", "map.1", "bitmap.x"):
        (directory / name).write_bytes(b"of somebody else")
    History.open(directory)
    assert {path.name for path in directory.iterdir()} == before | {"bitmap.99.saved", "map.1", "bitmap.x"}


def test_damage_is_followed_by_a_history_that_answers_all(directory: Path) -> None:
    cursor = History.open(directory).cursor
    array_file(directory).unlink()
    with pytest.raises(HistoryDamaged):
        History.open(directory)
    history = History.create(directory, SIZE, BLOCK, reason="damaged", number=cursor.number)
    assert history.changes(cursor).all
    assert history.changes(None).reason == "damaged"
    assert sorted(path.name for path in directory.iterdir()) == ["bitmap.1", "history.json"]
