# SPDX-License-Identifier: MIT
"""The process may die between any two steps: what it leaves opens to before or to after.

What a killed process leaves is what its files hold at that moment, stores to shared mappings included. So the files
are read before each line of change tracking code that an operation runs, and every state found is opened and checked.
One test kills for real, to show that this is what a kill leaves.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import blksnap_ublk.cbt
from blksnap_ublk.cbt import FoldPolicy, History, HistoryDamaged
from tests.unit.cbt.model import Model, expected_files, files_of, mark

CODE = str(Path(blksnap_ublk.cbt.__file__).parent)
SIZE = (4096 + 9) * 4096 + 700
BLOCK = 4096
ALWAYS = FoldPolicy(always=True)

Files = dict[str, bytes]


def read_files(directory: Path) -> Files:
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


def write_files(directory: Path, files: Files) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def before_each_line(operation: Callable[[], object], act: Callable[[], None]) -> None:
    """Run the operation; call `act` before each line of change tracking code, and once more at the end."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(CODE):
            return None
        if event == "line":
            act()
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        operation()
    finally:
        sys.settrace(former)
    act()


def states_of(directory: Path, operation: Callable[[], object]) -> list[Files]:
    """The different states of the files in the course of an operation, in order."""
    states: list[Files] = []

    def remember() -> None:
        files = read_files(directory)
        if not states or files != states[-1]:
            states.append(files)

    before_each_line(operation, remember)
    return states


def die_everywhere(
    tmp_path: Path, template: Path, operation: Callable[[History], object], check: Callable[[History], None]
) -> None:
    """Check what a death at any line of the operation leaves."""
    states = states_of(template, partial(operation, History.open(template, policy=ALWAYS)))
    assert len(states) > 2
    for place, files in enumerate(states):
        directory = write_files(tmp_path / f"state-{place}", files)
        found = History.open(directory, policy=ALWAYS)
        assert files_of(directory) == expected_files(found), f"state {place} of {len(states)}"
        check(found)


def history_with(template: Path, takes: list[list[int]]) -> tuple[History, Model]:
    template.mkdir()
    history = History.create(template, SIZE, BLOCK, policy=ALWAYS)
    model = Model(history.blocks)
    for changed in takes:
        mark(history.active, changed)
        model.active |= set(changed)
        history.prepare()
        history.commit(model.number + 1)
        model.take()
    return history, model


def destroy(history: History, model: Model, numbers: list[int], *, fold: bool) -> None:
    for number in numbers:
        history.destroy(number)
        model.held.remove(number)
    if fold:
        history.fold()


def test_prepare(tmp_path: Path) -> None:
    history, model = history_with(tmp_path / "template", [[1, 2], [4104]])
    mark(history.active, [7])
    model.active = {7}

    def check(found: History) -> None:
        assert found.prepare().count() == 0
        model.check(found)

    die_everywhere(tmp_path, tmp_path / "template", History.prepare, check)


def test_commit(tmp_path: Path) -> None:
    """The switch is done before `commit`: the marks that came after it stand in the prepared bitmap."""
    history, model = history_with(tmp_path / "template", [[1, 2], [4104]])
    mark(history.active, [2, 4095, 4096])
    mark(history.prepare(), [4105])
    model.active = {2, 4095, 4096}
    model.take()
    model.active = {4105}

    def check(found: History) -> None:
        if found.number == 2:
            assert found.prepared is not None
            found.commit(3)
        assert found.prepared is None
        model.check(found)

    die_everywhere(tmp_path, tmp_path / "template", lambda history: history.commit(3), check)


def test_abort(tmp_path: Path) -> None:
    history, model = history_with(tmp_path / "template", [[1, 2]])
    history.prepare()
    die_everywhere(tmp_path, tmp_path / "template", History.abort, model.check)


def test_destroy(tmp_path: Path) -> None:
    _, model = history_with(tmp_path / "template", [[1, 2], [2, 3], [4100]])

    def check(found: History) -> None:
        model.held = {1, 2, 3} if 2 in found.held else {1, 3}
        model.check(found)

    die_everywhere(tmp_path, tmp_path / "template", lambda history: history.destroy(2), check)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        pytest.param([], [1, 2], id="bitmaps into an array"),
        pytest.param([1, 2], [3, 4], id="bitmaps into the array that is there, which grows"),
        pytest.param([1, 2, 4, 5], [3], id="an array into an array"),
    ],
)
def test_fold(tmp_path: Path, before: list[int], now: list[int]) -> None:
    """Before, during and after a fold the answers are the same; a fold that was broken off is done again."""
    takes = [[1, 2, 4095], [2], [3, 4095], [1, 4105], [5, 4096], [6]]
    history, model = history_with(tmp_path / "template", takes)
    destroy(history, model, before, fold=True)
    destroy(history, model, now, fold=False)

    def check(found: History) -> None:
        model.check(found)
        found.fold()
        model.check(found)
        assert not found.fold()

    die_everywhere(tmp_path, tmp_path / "template", History.fold, check)


def test_fold_that_renumbers(tmp_path: Path) -> None:
    """The table is full, so the array is written anew, while numbers no block refers to are dropped."""
    history, model = history_with(tmp_path / "template", [[1], [1, 2], [1, 2, 4100], [1], [7]])
    destroy(history, model, [1, 2, 3], fold=True)
    destroy(history, model, [4], fold=False)
    policy = FoldPolicy(always=True, number_limit=4)

    def fold(history: History) -> None:
        history._policy = policy
        history.fold()

    def check(found: History) -> None:
        model.check(found)
        found._policy = policy
        found.fold()
        model.check(found)

    die_everywhere(tmp_path, tmp_path / "template", fold, check)


def test_lose(tmp_path: Path) -> None:
    history, model = history_with(tmp_path / "template", [[1, 2], [2, 3], [4100]])
    generation = history.generation

    def check(found: History) -> None:
        if found.generation != generation:
            model.lose("unclean")
        model.check(found)

    die_everywhere(tmp_path, tmp_path / "template", lambda history: history.lose("unclean"), check)


def grown_history(template: Path) -> tuple[History, Model]:
    """With an array, bitmaps, and a bitmap next to a snapshot that is held."""
    history, model = history_with(template, [[1, 2, 4095], [2], [3, 4095], [1, 4105]])
    destroy(history, model, [1, 2], fold=True)
    mark(history.active, [9])
    model.active = {9}
    model.size = SIZE
    return history, model


LARGE = 9 * SIZE + 1
"""A bitmap of it needs another page."""


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_begin_resize(tmp_path: Path, again: bool) -> None:
    history, model = grown_history(tmp_path / "template")
    if again:
        history.begin_resize(10 * SIZE)

    def check(found: History) -> None:
        model.check(found)
        found.abandon_resize()
        model.check(found)
        model.check(History.open(found.active.path.parent))

    die_everywhere(tmp_path, tmp_path / "template", lambda history: history.begin_resize(LARGE), check)


def test_end_resize(tmp_path: Path) -> None:
    """The process that does the I/O goes on with the new bitmap before `end_resize`; it may be told so again."""
    history, model = grown_history(tmp_path / "template")
    marked = model.active | model.grow(LARGE, BLOCK)
    mark(history.begin_resize(LARGE), marked)

    def check(found: History) -> None:
        if found.resizing is not None:
            mark(found.begin_resize(LARGE), marked)
            found.end_resize()
        model.check(found)
        found.fold()
        model.check(found)

    die_everywhere(tmp_path, tmp_path / "template", History.end_resize, check)


def test_abandon_resize(tmp_path: Path) -> None:
    history, model = grown_history(tmp_path / "template")
    history.begin_resize(LARGE)
    die_everywhere(tmp_path, tmp_path / "template", History.abandon_resize, model.check)


def test_create_again(tmp_path: Path) -> None:
    """After a loss: the former history, none, or the next one, but never a mixture."""
    template = tmp_path / "template"
    history, model = history_with(template, [[1, 2], [2, 3]])
    create = partial(History.create, size=SIZE, tracking_block=BLOCK, reason="damaged", number=2)
    generations = set()
    for place, files in enumerate(states_of(template, partial(create, template))):
        directory = write_files(tmp_path / f"state-{place}", files)
        try:
            found = History.open(directory)
        except HistoryDamaged:
            assert not (directory / "history.json").exists()
            found = create(directory)
        if found.generation == history.generation:
            model.check(found)
        else:
            assert found.changes(history.cursor).all
            assert found.changes(None).reason == "damaged"
        assert files_of(directory) == expected_files(found)
        generations.add(found.generation)
    assert len(generations) > 2


def test_killed(tmp_path: Path) -> None:
    """SIGKILL at some lines of a fold leaves a state that opens and answers as before."""
    history, model = history_with(tmp_path / "template", [[1, 2, 4095], [2], [3, 4095], [1, 4105], [6]])
    destroy(history, model, [1, 2], fold=True)
    destroy(history, model, [3, 4], fold=False)
    start = read_files(tmp_path / "template")
    lines = 0
    for line in (5, 40, 80, 120, 160, 200):
        lines = 0
        directory = write_files(tmp_path / f"killed-{line}", start)
        child = os.fork()
        if child == 0:

            def strike(line: int = line) -> None:
                nonlocal lines
                lines += 1
                if lines == line:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                before_each_line(History.open(directory, policy=ALWAYS).fold, strike)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, f"line {line}"
        found = History.open(directory, policy=ALWAYS)
        model.check(found)
        found.fold()
        model.check(found)
        assert files_of(directory) == expected_files(found)
