# SPDX-License-Identifier: MIT
"""A file system that is full, at any step: the call fails, nothing is lost or left behind, and it can be repeated."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blksnap_ublk.cbt import FoldPolicy, History
from tests.unit.cbt.model import Model, expected_files, files_of, mark

SIZE = 3 * 4096 * 4096
LARGE = 3 * SIZE
"""A bitmap of it needs another page."""
ALWAYS = FoldPolicy(always=True)


class FailingCalls:
    """Lets calls that need room pass, and fails the one with number `at` (from 1)."""

    def __init__(self) -> None:
        self.at = 0
        self.seen = 0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def may_fail(*args: Any, **options: Any) -> Any:
            self.seen += 1
            if self.seen == self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **options)

        return may_fail


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> FailingCalls:
    calls = FailingCalls()
    for name in ("open", "posix_fallocate", "pwrite", "write", "replace"):
        monkeypatch.setattr(os, name, calls.wrap(getattr(os, name)))
    return calls


def prepare(history: History, model: Model) -> None:
    history.prepare()


def commit(history: History, model: Model) -> None:
    history.commit(model.number)


def destroy(history: History, model: Model) -> None:
    history.destroy(2)


def fold(history: History, model: Model) -> None:
    history.fold()


def lose(history: History, model: Model) -> None:
    history.lose("unclean")


def begin_resize(history: History, model: Model) -> None:
    history.begin_resize(LARGE)


def end_resize(history: History, model: Model) -> None:
    history.end_resize()


@pytest.mark.parametrize("operation", [prepare, commit, destroy, fold, lose, begin_resize, end_resize])
@pytest.mark.parametrize("arrays", [False, True], ids=["bitmaps", "arrays"])
def test_nth_call_fails(
    tmp_path: Path, calls: FailingCalls, operation: Callable[[History, Model], None], arrays: bool
) -> None:
    nth, failed = 0, True
    while failed:
        nth += 1
        directory = tmp_path / str(nth)
        directory.mkdir()
        history, model = ready_for(operation, directory, arrays)
        calls.seen, calls.at = 0, nth
        try:
            operation(history, model)
            failed = False
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        calls.at = 0
        if failed:
            assert files_of(directory) == expected_files(history)
            if history.resizing is None:  # what is made ahead is known to its maker only
                assert expected_files(History.open(directory, policy=ALWAYS)) == expected_files(history)
            operation(history, model)
        if operation is commit:
            model.held.add(model.number)
        elif operation is destroy:
            model.held.remove(2)
        elif operation is lose:
            model.lose("unclean")
        assert files_of(directory) == expected_files(history)
        for found in (history, History.open(directory, policy=ALWAYS)):
            model.check(found)
    assert nth > 3


def ready_for(operation: Callable[..., None], directory: Path, arrays: bool) -> tuple[History, Model]:
    history = History.create(directory, SIZE, 4096, policy=ALWAYS)
    model = Model(history.blocks)
    for number, changed in enumerate([[1, 2], [2, 5000], [3], [9000], [4]], start=1):
        mark(history.active, changed)
        model.active |= set(changed)
        history.prepare()
        history.commit(number)
        model.take()
        if arrays and number == 2:
            history.destroy(1)
            model.held.remove(1)
            history.fold()
    if operation is commit:
        mark(history.active, [7])
        history.prepare()
        model.intervals.append({7})
    if operation is end_resize:
        model.size = SIZE
        mark(history.begin_resize(LARGE), model.grow(LARGE, 4096))
    if operation is fold:
        for number in (2, 3, 4):
            history.destroy(number)
            model.held.remove(number)
    return history, model


def test_create_leaves_nothing(tmp_path: Path, calls: FailingCalls) -> None:
    failed = True
    while failed:
        calls.seen = 0
        calls.at += 1
        try:
            History.create(tmp_path, SIZE)
            failed = False
        except OSError:
            assert os.listdir(tmp_path) == []
    assert calls.at > 5
