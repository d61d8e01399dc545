# SPDX-License-Identifier: MIT
"""Parts of what looks after storages, without a kernel that has ublk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.snapshot.catalogue import ImageEntry, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Growing
from blksnap_ublk.snapshot.filling.evicting import victim
from blksnap_ublk.snapshot.filling.job import Job
from blksnap_ublk.snapshot.filling.rate import Rate
from blksnap_ublk.snapshot.storage.extending import SMALLEST, extend
from tests.loop_devices import run

MIB = 1 << 20


@contextmanager
def unguarded() -> Iterator[None]:
    yield


def snapshot(name: str, *devices: str, phase: Phase = Phase.ACTIVE) -> SnapshotEntry:
    images = [ImageEntry(f"{name}.{n}", device, "", "", MIB, 4096, 1, "", 1, None) for n, device in enumerate(devices)]
    return SnapshotEntry(name, name, phase, False, 0, images, "key")


def chosen(snapshots: list[SnapshotEntry], *broken: str, writers_wait: bool = False) -> str | None:
    found = victim(snapshots, broken, writers_wait=writers_wait)
    return None if found is None else found.id


def test_the_oldest_goes_and_the_last_stays() -> None:
    a, b, c = (snapshot(name, "d") for name in "abc")
    assert chosen([a, b, c]) == "a"
    assert chosen([b, c], writers_wait=True) == "b"
    assert chosen([c]) is None
    assert chosen([]) is None


def test_broken_ones_go_first_and_never_the_last_that_is_not() -> None:
    a, b, c = (snapshot(name, "d") for name in "abc")
    assert chosen([a, b, c], "b") == "b"
    assert chosen([a, b], "b") == "b"
    assert chosen([a, b], "a") == "a"
    assert chosen([a, b, c], "a", "b", "c") is None


def test_who_comes_or_goes_is_no_victim() -> None:
    going, comes = snapshot("a", "d", phase=Phase.DESTROYING), snapshot("c", "d", phase=Phase.CREATING)
    b, d = snapshot("b", "d"), snapshot("d", "d")
    assert chosen([going, b]) is None
    assert chosen([b, comes]) is None
    assert victim([b, comes], (), writers_wait=False, coming=True) == b
    assert chosen([b, d, comes]) == "b"
    assert chosen([comes, d]) is None


def test_while_writers_wait_nobody_goes_whose_end_waits_for_them() -> None:
    a, b, other = snapshot("a", "d"), snapshot("b", "d"), snapshot("c", "e")
    assert chosen([a, b], "b", writers_wait=True) is None
    assert chosen([a, b], "a", writers_wait=True) == "a"
    assert chosen([a, b, other], "b", writers_wait=True) == "a"
    assert chosen([a, other], writers_wait=True) == "a"
    c = snapshot("c", "d")
    assert chosen([a, b, c], "b", "c", writers_wait=True) is None


def test_a_rate_sees_bursts_at_once_and_remembers_them() -> None:
    rate = Rate()
    assert rate.per_second() == 0
    rate.read(10.0, 5 * MIB)
    assert rate.per_second() == 0
    rate.read(10.01, 6 * MIB)
    assert rate.per_second() == pytest.approx(4 * MIB)
    rate.read(11.0, 105 * MIB)
    assert rate.per_second() == pytest.approx(100 * MIB)
    rate.read(12.0, 105 * MIB)
    assert rate.per_second() == pytest.approx(50 * MIB)
    rate.read(12.5, 5 * MIB)
    rate.read(13.0, 15 * MIB)
    assert rate.per_second() == pytest.approx(110 * MIB / 3)
    rate.read(30.0, 15 * MIB)
    rate.read(35.0, 15 * MIB)
    assert rate.per_second() == 0


def test_one_job_at_a_time() -> None:
    job, go = Job("test"), threading.Event()

    def wait() -> None:
        go.wait()

    assert job.start(wait)
    assert not job.start(lambda: None)
    assert job.running
    go.set()
    job.wait(60)
    assert not job.running
    assert job.seconds == 0
    done = threading.Event()

    def fails() -> None:
        done.set()
        raise OSError(errno.EIO, "as expected")

    assert job.start(fails)
    job.wait(60)
    assert done.is_set()
    assert not job.running


def test_files_are_not_made_longer_while_something_is_frozen() -> None:
    growing = Growing()
    extended = threading.Event()

    def extending_one() -> None:
        with growing.extending():
            extended.set()

    assert growing.acquire(60)
    assert growing.acquire(60)
    thread = threading.Thread(target=extending_one)
    thread.start()
    growing.release()
    assert not extended.wait(0.1)
    growing.release()
    thread.join(60)
    assert extended.is_set()
    with growing.extending(), growing.extending():
        assert not growing.acquire(0.01)
    with growing.extending():
        pass
    assert growing.acquire(60)
    growing.release()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 16 MiB."""
    if os.geteuid() != 0:
        pytest.skip("not root: no tmpfs of a size can be mounted")
    run("mount", "-t", "tmpfs", "-o", f"size={16 * MIB}", "none", str(tmp_path))
    yield tmp_path
    run("umount", str(tmp_path))


def test_a_file_is_extended_and_gets_less_where_there_is_less(small: Path) -> None:
    path = small / "file"
    path.write_bytes(bytes(MIB + 100))
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert extend(descriptor, MIB, 3 * MIB + 100, 4096, unguarded) == 3 * MIB
        assert os.fstat(descriptor).st_size == 4 * MIB
        assert extend(descriptor, MIB, 3 * MIB, 4096, unguarded) == 3 * MIB
        assert extend(descriptor, 4 * MIB, 64 * MIB, 4096, unguarded) == 8 * MIB
        assert os.fstat(descriptor).st_size == 12 * MIB
        (small / "other").write_bytes(b"-")
        for wanted in (64 * MIB, SMALLEST):
            with pytest.raises(OSError, match="No space"):
                extend(descriptor, 12 * MIB, wanted, 4096, unguarded)
            assert os.fstat(descriptor).st_size == 12 * MIB
        assert extend(descriptor, 12 * MIB, SMALLEST - 4096, 4096, unguarded) == SMALLEST - 4096
        with pytest.raises(OSError, match="No space"):
            extend(descriptor, 16 * MIB - 4096, 4095, 4096, unguarded)
    finally:
        os.close(descriptor)
