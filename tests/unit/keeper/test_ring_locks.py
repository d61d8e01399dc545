# SPDX-License-Identifier: MIT
"""The lock of an io process is free exactly when its last duplicate is closed, wherever that is."""

import os
import subprocess
from pathlib import Path

import pytest

from blksnap_ublk.keeper.processes import Member, ProcessesFile, Record, read_processes
from blksnap_ublk.keeper.ring_locks import RingLocks, sign


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


def test_the_locks_of_the_dead_are_told_from_those_of_the_living(tmp_path: Path) -> None:
    locks = RingLocks(tmp_path)
    living, spare, dead = locks.create(), locks.create(), locks.create()
    sign(living)
    assert (locks.held(), locks.of_dead()) == ({1, 2, 3}, set())  # `spare` has not signed: it has no ring
    child = os.fork()
    if child == 0:
        sign(dead)
        os._exit(0)
    # It has ended, but nobody has asked for it yet; what it had sent is still under way.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert (locks.held(), locks.of_dead()) == ({1, 2, 3}, {3})
    os.waitpid(child, 0)
    assert locks.of_dead() == {3}
    os.close(dead)
    assert (locks.held(), locks.of_dead()) == ({1, 2}, set())
    assert RingLocks(tmp_path).create() >= 0
    assert not list(tmp_path.glob("ring-lock.3.*"))
    os.close(living)
    os.close(spare)


def test_a_full_tmpfs_is_no_obstacle(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True)
    try:
        processes = ProcessesFile(tmp_path / "processes")
        with pytest.raises(OSError, match="No space"):
            (tmp_path / "full").write_bytes(bytes(1 << 20))
        descriptor = RingLocks(tmp_path).create()
        sign(descriptor)
        assert RingLocks(tmp_path).held() == {1}
        os.close(descriptor)
        record = Record({"keeper": Member(1, 2)}, [1.5])
        processes.write(record)
        assert processes.read() == record
        processes.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\xff", '{"processes": {"io": {"pid": "x", "started": 1}}}', "{}" + " " * 9000]
)
def test_a_record_that_makes_no_sense_names_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "processes").write_bytes(text.encode("latin-1"))
    assert read_processes(tmp_path / "processes") == Record()
    file = ProcessesFile(tmp_path / "processes")
    assert file.read() == Record()
    file.close()
    assert read_processes(tmp_path / "none") == Record()
