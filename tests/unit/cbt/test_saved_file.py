# SPDX-License-Identifier: MIT
"""A history that was saved comes back as it was, or not at all."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blksnap_ublk.cbt import Cursor, FoldPolicy, History, HistoryDamaged, HistoryError, saved_file
from tests.unit.cbt.model import Model, expected_files, files_of, mark

BLOCK = 4096
SIZE = (4096 + 9) * BLOCK + 700
NOTE = b'{"some":["note"]}'


def history_with(directory: Path, takes: list[set[int]], *, fold: bool, size: int = SIZE) -> tuple[History, Model]:
    """All snapshots of it have been destroyed; the last set is marked in the interval that runs."""
    directory.mkdir()
    history = History.create(directory, size, BLOCK, policy=FoldPolicy(always=True))
    model = Model(history.blocks, size=size)
    for place, changed in enumerate(takes):
        mark(history.active, changed)
        model.active = set(changed)
        if place < len(takes) - 1:
            history.prepare()
            history.commit(history.number + 1)
            model.take()
            history.destroy(history.number)
            model.held.clear()
            if fold:
                history.fold()
    return history, model


def restored(path: Path, directory: Path) -> History:
    saved = saved_file.read(path)
    assert saved is not None
    directory.mkdir()
    return saved_file.restore(path, saved, directory)


sets = st.sets(st.sampled_from([0, 1, 63, 64, 4095, 4096, 4103, 4104]) | st.integers(0, 4104), max_size=20)


@settings(max_examples=40, deadline=None)
@given(takes=st.lists(sets, min_size=1, max_size=5), fold=st.booleans(), reopened=st.booleans())
def test_every_answer_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, takes: list[set[int]], fold: bool, reopened: bool
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    history, model = history_with(folder / "before", takes, fold=fold)
    saved_file.save(history, folder / "file", NOTE)
    found = restored(folder / "file", folder / "after")
    if reopened:
        found = History.open(folder / "after")
    assert (found.generation, found.number) == (history.generation, history.number)
    model.check(found)
    assert files_of(folder / "after") == expected_files(found)
    # It goes on: what was marked before is part of the next interval.
    mark(found.active, [5])
    model.active.add(5)
    found.prepare()
    found.commit(found.number + 1)
    model.take()
    model.check(found)
    saved = saved_file.read(folder / "file")
    assert saved is not None
    assert bytes(saved.note) == NOTE


def test_what_is_held_and_grown_and_former(tmp_path: Path) -> None:
    """Nobody holds a snapshot afterwards; sizes and the reason of a former generation stay."""
    former = uuid4()
    (tmp_path / "before").mkdir()
    history = History.create(tmp_path / "before", SIZE, BLOCK, former=(former, "unclean"))
    model = Model(history.blocks, size=SIZE)
    history.prepare()
    history.commit(1)
    model.take()
    mark(history.begin_resize(2 * SIZE), model.grow(2 * SIZE, BLOCK))
    history.end_resize()
    saved_file.save(history, tmp_path / "file", NOTE)
    found = restored(tmp_path / "file", tmp_path / "after")
    assert not found.held
    model.held.clear()
    model.check(found)
    assert found.size == 2 * SIZE
    assert found.changes(Cursor(former, 7)).reason == "unclean"
    assert found.changes(Cursor(uuid4(), 7)).reason == "new-generation"


def test_not_in_the_midst_of_something(tmp_path: Path) -> None:
    history, _ = history_with(tmp_path / "before", [{1}, {2}], fold=False)
    saved_file.save(history, tmp_path / "file", NOTE)
    saved = (tmp_path / "file").read_bytes()
    history.prepare()
    with pytest.raises(HistoryError, match="not ended"):
        saved_file.save(history, tmp_path / "file", NOTE)
    history.abort()
    history.begin_resize(2 * SIZE)
    with pytest.raises(HistoryError, match="not ended"):
        saved_file.save(history, tmp_path / "file", NOTE)
    assert sorted(os.listdir(tmp_path)) == ["before", "file"]
    assert (tmp_path / "file").read_bytes() == saved


def test_mark(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert saved_file.read(path) is None
    history, _ = history_with(tmp_path / "before", [{1}], fold=False)
    saved_file.save(history, path, NOTE)
    saved_file.write_mark(path, history.generation)
    saved = saved_file.read(path)
    assert saved is not None
    assert (saved.generation, saved.history) == (history.generation, None)
    (tmp_path / "after").mkdir()
    with pytest.raises(HistoryDamaged):
        saved_file.restore(path, saved, tmp_path / "after")


def answer(path: Path, directory: Path) -> str:
    """`damaged`, or the restored history as text."""
    try:
        saved = saved_file.read(path)
        found = restored(path, directory)
    except HistoryDamaged:
        assert not directory.exists() or os.listdir(directory) == []
        return "damaged"
    assert saved is not None
    return f"{bytes(saved.note)!r} {found.generation} {found.last_change().tobytes()!r} {found.active.rows.tobytes()!r}"


def test_damage_anywhere_is_seen(tmp_path: Path) -> None:
    """Cut at any byte, or with a bit of any byte flipped, it is not used, or gives what was saved."""
    history, _ = history_with(tmp_path / "before", [{1, 2, 9}, {2}, {3, 7}], fold=True, size=10 * BLOCK)
    path = tmp_path / "file"
    saved_file.save(history, path, NOTE)
    whole = path.read_bytes()
    assert len(whole) < 4000
    right = answer(path, tmp_path / "whole")
    assert right != "damaged"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert answer(path, tmp_path / f"cut-{length}") == "damaged"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert answer(path, tmp_path / f"flip-{place}") in ("damaged", right)
    path.write_bytes(whole + b"x")
    assert answer(path, tmp_path / "longer") == "damaged"


def test_names_of_parts_lead_nowhere_else(tmp_path: Path) -> None:
    history, _ = history_with(tmp_path / "before", [{1}], fold=False)
    path = tmp_path / "file"
    saved_file.save(history, path, NOTE)
    saved = saved_file.read(path)
    assert saved is not None
    assert saved.history is not None
    name = "../escaped"
    evil = msgspec.structs.replace(
        saved,
        history=msgspec.structs.replace(saved.history, active=name),
        parts=(msgspec.structs.replace(saved.parts[0], name=name),),
    )
    data = path.read_bytes()[: saved.parts[0].stored]
    with path.open("wb") as file:
        file.write(data)
        saved_file._write_head(file, evil)
    with pytest.raises(HistoryDamaged):
        saved_file.read(path)


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_failed_save_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    history, _ = history_with(tmp_path / "before", [{1}], fold=False)
    path = tmp_path / "file"
    saved_file.write_mark(path, history.generation)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        saved_file.save(history, path, NOTE)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["before", "file"]
    saved = saved_file.read(path)
    assert saved is not None
    assert saved.history is None


def test_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, then its name, then the directory: a power cut leaves the former or the whole of the next one."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        order.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    saved_file.write_mark(tmp_path / "file", uuid4())
    assert order == ["sync file.part", "rename", f"sync {tmp_path.name}"]


def test_killed_while_saving(tmp_path: Path) -> None:
    """A kill at any call leaves the former file or the next one."""
    history, _ = history_with(tmp_path / "before", [{1, 2}, {3}], fold=False)
    path = tmp_path / "file"
    outcomes = set()
    for nth in range(1, 7):
        saved_file.write_mark(path, history.generation)
        child = os.fork()
        if child == 0:
            seen = 0

            def strike(function: object, *arguments: object, last: int = nth) -> object:
                nonlocal seen
                seen += 1
                if seen == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                assert callable(function)
                return function(*arguments)

            for name in ("open", "fsync", "replace", "close"):
                call = getattr(os, name)
                setattr(os, name, lambda *arguments, call=call: strike(call, *arguments))
            try:
                saved_file.save(history, path, NOTE)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        saved = saved_file.read(path)
        assert saved is not None
        outcomes.add(saved.history is None)
        if saved.history is not None:
            assert restored(path, tmp_path / f"after-{nth}").last_change().tolist() == history.last_change().tolist()
    assert outcomes == {True, False}
