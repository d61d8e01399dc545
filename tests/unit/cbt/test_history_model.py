# SPDX-License-Identifier: MIT
"""Any order of marks, takes, destroys, folds, losses, restarts: every answer is exact, for every pair of instants."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blksnap_ublk.cbt import FoldPolicy, History
from tests.unit.cbt.model import Model, expected_files, files_of, mark

BLOCK = 4096
SIZES = [1, BLOCK, 77 * BLOCK, 4096 * BLOCK, 3 * 4096 * BLOCK + 5 * BLOCK + 512]


class HistoryMachine(RuleBasedStateMachine):
    """A history and the model side by side."""

    exact = True
    policies = st.sampled_from([FoldPolicy(), FoldPolicy(always=True)])

    @initialize(size=st.sampled_from(SIZES), data=st.data())
    def begin(self, size: int, data: st.DataObject) -> None:
        self.temporary = tempfile.TemporaryDirectory()
        self.directory = Path(self.temporary.name)
        self.policy = data.draw(self.policies)
        self.history = History.create(self.directory, size, BLOCK, policy=self.policy)
        self.model = Model(self.history.blocks, size=size)
        self.generations = {self.history.generation}

    @rule(data=st.data(), longest=st.sampled_from([1, 70, 5000]))
    def mark(self, data: st.DataObject, longest: int) -> None:
        last = self.model.blocks - 1
        near_edges = st.sampled_from([min(last, block) for block in (0, 63, 64, 4095, 4096, 8191, last)])
        first = data.draw(near_edges | st.integers(0, last))
        length = data.draw(st.integers(1, longest))
        changed = range(first, min(first + length, self.model.blocks))
        mark(self.history.active, changed)
        self.model.active |= set(changed)

    @rule(before=st.booleans())
    def take(self, before: bool) -> None:
        prepared = self.history.prepare()
        assert self.history.prepare() is prepared
        if before:
            self.model.check(self.history, exact=self.exact)
        self.history.commit(self.model.number + 1)
        self.model.take()
        assert self.history.active is prepared

    @rule()
    def take_aborted(self) -> None:
        self.history.prepare()
        self.history.abort()
        self.history.abort()

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def destroy(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model.held)))
        self.history.destroy(number)
        self.model.held.remove(number)

    @rule()
    def fold(self) -> None:
        self.history.fold()
        assert not self.history.fold()

    @rule(prepared=st.booleans())
    def reopen(self, prepared: bool) -> None:
        if prepared:
            self.history.prepare()
        self.history = History.open(self.directory, policy=self.policy)
        assert (self.history.prepared is not None) is prepared
        self.history.abort()

    @precondition(lambda self: self.model.size < SIZES[-1] * 2)
    @rule(
        more=st.sampled_from([1, 512, BLOCK, 70 * BLOCK, 4096 * BLOCK, 4097 * BLOCK + 1]),
        broken_off=st.sampled_from(["", "", "refused", "control dies", "io dies"]),
    )
    def resize(self, more: int, broken_off: str) -> None:
        size = self.model.size + more
        bitmap = self.history.begin_resize(size)
        self.model.check(self.history, exact=self.exact)
        if broken_off == "refused":
            self.history.abandon_resize()
            self.history.abandon_resize()
            return
        marked = self.model.active | self.model.grow(size, BLOCK) if broken_off != "io dies" else self.model.active
        mark(bitmap, marked)
        if broken_off == "control dies":
            self.history = History.open(self.directory, policy=self.policy)
            assert self.history.resizing is not None
            mark(self.history.begin_resize(size), marked)
        if broken_off == "io dies":
            self.history = History.open(self.directory, policy=self.policy)
            self.history.lose("resized")
            self.history.abandon_resize()
            self.model.lose("resized")
            self.generations.add(self.history.generation)
            return
        self.history.end_resize()
        assert self.history.size == size

    @precondition(lambda self: self.model.number)
    @rule(reason=st.sampled_from(["unclean", "resized"]))
    def lose(self, reason: str) -> None:
        self.history.lose(reason)
        self.model.lose(reason)
        assert self.history.generation not in self.generations
        self.generations.add(self.history.generation)

    @invariant()
    def answers_are_right(self) -> None:
        self.model.check(self.history, exact=self.exact)
        assert files_of(self.directory) == expected_files(self.history)

    def teardown(self) -> None:
        if hasattr(self, "temporary"):
            self.temporary.cleanup()


class FewNumbersMachine(HistoryMachine):
    """Arrays that can tell only a few change numbers apart: old ones are collapsed, upward."""

    exact = False
    policies = st.builds(FoldPolicy, always=st.just(True), number_limit=st.integers(1, 4))


TestHistory: Any = HistoryMachine.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestFewNumbers: Any = FewNumbersMachine.TestCase
TestFewNumbers.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
