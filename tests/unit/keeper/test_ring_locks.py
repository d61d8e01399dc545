# SPDX-License-Identifier: MIT
"""The lock of an io process is free exactly when its last duplicate is closed, wherever that is."""

import os
from pathlib import Path

from blksnap_ublk.keeper.ring_locks import RingLocks


def test_a_lock_is_held_as_long_as_any_duplicate(tmp_path: Path) -> None:
    locks = RingLocks(tmp_path)
    first = locks.create()
    copy = os.dup(first)
    os.close(first)
    assert locks.held() == {1}
    second = locks.create()
    assert locks.held() == {1, 2}
    os.close(copy)
    assert locks.held() == {2}
    third = locks.create()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ring-lock.2", "ring-lock.3"]
    os.close(second)
    locks.remove_free()
    assert [path.name for path in tmp_path.iterdir()] == ["ring-lock.3"]
    os.close(third)
    locks.remove_free()
    assert list(tmp_path.iterdir()) == []


def test_looking_does_not_take_a_lock(tmp_path: Path) -> None:
    locks = RingLocks(tmp_path)
    os.close(locks.create())
    assert locks.held() == set()
    assert RingLocks(tmp_path).held() == set()
    (tmp_path / "ring-lock.odd").touch()
    assert locks.held() == set()


def test_a_file_that_a_former_attempt_left_is_used(tmp_path: Path) -> None:
    (tmp_path / "ring-lock.new").touch()
    locks = RingLocks(tmp_path)
    descriptor = locks.create()
    assert locks.held() == {1}
    assert [path.name for path in tmp_path.iterdir()] == ["ring-lock.1"]
    os.close(descriptor)
