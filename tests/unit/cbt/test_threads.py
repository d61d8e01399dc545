# SPDX-License-Identifier: MIT
"""Queries in other threads stay exact while snapshots come and go and layers are folded beneath them."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from blksnap_ublk.cbt import Cursor, FoldPolicy, History, query
from tests.unit.cbt.model import Model, blocks_of, mark

BLOCKS = 2 * 4096 + 10


@pytest.mark.parametrize("number_limit", [65535, 24], ids=["in place", "renumbered"])
def test_queries_beside_folds(tmp_path: Path, number_limit: int) -> None:
    """Snapshots 1 and 40 stay held; whatever lies between is destroyed and folded while it is asked for."""
    seed = 7
    chance = random.Random(seed)
    policy = FoldPolicy(always=True, number_limit=number_limit)
    history = History.create(tmp_path, BLOCKS * 4096, 4096, policy=policy)
    model = Model(BLOCKS)
    for number in range(1, 41):
        changed = [chance.randrange(20) * 400 for _ in range(6)]
        mark(history.active, changed)
        model.active |= set(changed)
        history.prepare()
        history.commit(number)
        model.take()
    ready, done = Event(), Event()

    def ask(start: int) -> int:
        asked = 0
        while not done.is_set() or asked < 40:
            since = (start + asked) % 40
            changes = history.changes(Cursor(history.generation, since), 40)
            assert blocks_of(changes, history.size) == model.changed(since, 40), f"seed {seed}, since {since}"
            asked += 1
            ready.set()
        return asked

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask, start) for start in (0, 17)]
        try:
            ready.wait()
            for number in chance.sample(range(2, 40), 38):
                history.destroy(number)
                history.fold()
        finally:
            done.set()
        assert sum(future.result() for future in asking) >= 80
    model.held = {1, 40}
    model.check(history)


def test_query_that_began_before_a_fold(tmp_path: Path) -> None:
    """It goes on with the layers it has, while their array is written to and grows beyond what it has mapped."""
    history = History.create(tmp_path, BLOCKS * 4096, 4096, policy=FoldPolicy(always=True))
    model = Model(BLOCKS)
    for number, changed in enumerate([[1, 2], [2, 3], [3, 4], [1, 5000], [8200], [7]], start=1):
        mark(history.active, changed)
        model.active = set(changed)
        history.prepare()
        history.commit(number)
        model.take()
    for number in (1, 2):
        history.destroy(number)
    history.fold()
    before = history._state
    for number in (3, 4):
        history.destroy(number)
    assert history.fold()
    assert len(history._state.layers) < len(before.layers)
    for since in range(6):
        for until in (5, 6):
            layers = [layer for layer in before.layers if layer.last <= until]
            found = query.changed_blocks(layers, since, history.active.geometry)
            assert set(np.flatnonzero(found).tolist()) == (model.changed(since, until) if since < until else set())
