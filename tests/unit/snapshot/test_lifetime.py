# SPDX-License-Identifier: MIT
"""Snapshots that end by themselves: by time, whatever the wall clock does, and with their process."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blksnap_ublk.errors import BlksnapError, NotFound, UsageError
from blksnap_ublk.snapshot import lifetime
from blksnap_ublk.snapshot.catalogue import Catalogue, Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context

TTL = 100.0
PATIENCE = 60.0


class Clocks:
    """The wall clock, which anybody may set, and the one that goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.wall = 1_769_860_800.0
        self.going = 5_000.0
        self.restart()

    def restart(self) -> None:
        """As in another control process."""
        importlib.reload(lifetime)
        self._monkeypatch.setattr(lifetime, "_clock", lambda: self.going)
        self._monkeypatch.setattr(time, "time", lambda: self.wall)

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.going += seconds


@pytest.fixture
def clocks() -> Iterator[Clocks]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Clocks(monkeypatch)
    importlib.reload(lifetime)


@pytest.fixture
def events() -> list[tuple[str, dict[str, object]]]:
    return []


@pytest.fixture
def context(tmp_path: Path, events: list[tuple[str, dict[str, object]]]) -> Context:
    """No device is served: lifetimes need the catalogue only."""
    none = cast(Any, None)

    def emit(kind: str, *, snapshot: str | None = None, device: str | None = None, **data: object) -> None:
        events.append((kind, data | {"snapshot": snapshot}))

    return Context(
        io=none, keeper=none, disks=none, state=none, catalogue=Catalogue(tmp_path), registry=none, emit=emit
    )


def held(context: Context, lasts: lifetime.Lifetime, now: float = 0.0) -> SnapshotEntry:
    """A snapshot as `create` puts it into the catalogue."""
    entry = SnapshotEntry(
        id=str(uuid.uuid4()),
        created="2026-01-31T12:00:00.000000Z",
        phase=Phase.ACTIVE,
        frozen=False,
        gate_us=0,
        images=[],
        storage_key="storage",
        members=["device"],
        ttl=lasts.ttl,
        expires=lasts.expires(now),
        while_pid=lasts.while_pid,
        while_pid_start=lasts.while_pid_start,
    )
    context.catalogue.put_snapshot(entry)
    return entry


def ids(entries: list[SnapshotEntry]) -> list[str]:
    return [entry.id for entry in entries]


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("inf"), float("nan"), 1e300, lifetime.LONGEST_TTL + 1])
def test_what_is_no_time_to_live(ttl: float) -> None:
    with pytest.raises(UsageError, match=r"^--ttl: "):
        lifetime.make(ttl, None)


@pytest.mark.parametrize("pid", [0, -1, 1 << 22, (1 << 22) + 1, 1 << 62])
def test_what_is_no_process(pid: int) -> None:
    with pytest.raises(UsageError, match=f"^--while-pid {pid}: no such process"):
        lifetime.make(None, pid)


def test_a_snapshot_without_end(context: Context, clocks: Clocks) -> None:
    entry = held(context, lifetime.make(None, None), clocks.wall)
    assert entry.expires is None
    clocks.wait(1e9)
    assert lifetime.ended(context) == []
    with pytest.raises(UsageError, match=f"^snapshot {entry.id}: has no time to live; give --ttl TIME"):
        lifetime.renew(context, entry)


def test_time_ends_it(context: Context, clocks: Clocks) -> None:
    entry = held(context, lifetime.make(TTL, None), clocks.wall)
    other = held(context, lifetime.make(2 * TTL, None), clocks.wall)
    assert lifetime.ended(context) == []
    clocks.wait(TTL - 1)
    assert lifetime.ended(context) == []
    clocks.wait(1)
    assert ids(lifetime.ended(context)) == [entry.id]
    clocks.wait(TTL)
    assert sorted(ids(lifetime.ended(context))) == sorted([entry.id, other.id])
    context.catalogue.remove_snapshot(entry.id)
    assert ids(lifetime.ended(context)) == [other.id]


def test_one_that_is_being_taken_or_removed(context: Context, clocks: Clocks) -> None:
    creating = held(context, lifetime.make(TTL, None), clocks.wall)
    context.catalogue.put_snapshot(msgspec.structs.replace(creating, phase=Phase.CREATING))
    destroying = held(context, lifetime.make(TTL, None), clocks.wall)
    context.catalogue.put_snapshot(msgspec.structs.replace(destroying, phase=Phase.DESTROYING))
    clocks.wait(2 * TTL)
    assert ids(lifetime.ended(context)) == [destroying.id]
    for entry in (creating, destroying):
        with pytest.raises(NotFound, match="no such snapshot"):
            lifetime.renew(context, entry)


def test_renewing(context: Context, clocks: Clocks, events: list[tuple[str, dict[str, object]]]) -> None:
    entry = held(context, lifetime.make(TTL, None), clocks.wall)
    clocks.wait(TTL - 1)
    renewed = lifetime.renew(context, entry)
    assert (renewed.ttl, renewed.expires) == (TTL, clocks.wall + TTL)
    assert context.catalogue.snapshot(entry.id) == renewed
    assert [kind for kind, _ in events] == ["renewed"]
    clocks.wait(TTL - 1)
    assert lifetime.ended(context) == []
    assert lifetime.renew(context, entry, 3 * TTL).ttl == 3 * TTL
    clocks.wait(3 * TTL - 1)
    assert lifetime.ended(context) == []
    lifetime.renew(context, entry, 1)  # shorter than what is left, or longer: from now on
    clocks.wait(1)
    assert ids(lifetime.ended(context)) == [entry.id]
    with pytest.raises(UsageError, match="--ttl"):
        lifetime.renew(context, entry, 0)


def test_one_that_had_no_time_to_live_gets_one(context: Context, clocks: Clocks) -> None:
    entry = held(context, lifetime.make(None, os.getpid()), clocks.wall)
    assert lifetime.renew(context, entry, TTL).while_pid == os.getpid()
    clocks.wait(TTL)
    assert ids(lifetime.ended(context)) == [entry.id]


def test_what_is_over_stays_over(context: Context, clocks: Clocks) -> None:
    entry = held(context, lifetime.make(TTL, None), clocks.wall)
    clocks.wait(TTL)
    for _ in range(2):
        with pytest.raises(NotFound, match="its time is over"):
            lifetime.renew(context, entry, TTL)
        assert ids(lifetime.ended(context)) == [entry.id]


def test_renewing_and_ending_at_once(context: Context) -> None:
    """Either it is renewed, and goes on, or it is not, and ends."""
    for _ in range(100):
        entry = held(context, lifetime.make(0.002, None), time.time())
        start = threading.Barrier(2)
        renewed: list[bool] = []

        def renew(
            entry: SnapshotEntry = entry, start: threading.Barrier = start, renewed: list[bool] = renewed
        ) -> None:
            start.wait()
            try:
                lifetime.renew(context, entry, TTL)
                renewed.append(True)
            except BlksnapError:
                renewed.append(False)

        thread = threading.Thread(target=renew)
        thread.start()
        start.wait()
        found = []
        while thread.is_alive():
            found += lifetime.ended(context)
        found += lifetime.ended(context)
        assert renewed == [not found]
        context.catalogue.remove_snapshot(entry.id)


steps = st.lists(st.tuples(st.floats(0, TTL), st.floats(-1e7, 1e7)), max_size=8)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_a_wall_clock_that_jumps_changes_nothing(
    context: Context, clocks: Clocks, steps: list[tuple[float, float]]
) -> None:
    entry = held(context, lifetime.make(TTL, None), clocks.wall)
    assert lifetime.ended(context) == []
    begin = clocks.going
    for elapsed, jump in steps:
        clocks.wait(elapsed)
        clocks.wall += jump
        assert ids(lifetime.ended(context)) == [entry.id] * (clocks.going >= begin + TTL)
    context.catalogue.remove_snapshot(entry.id)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(elapsed=st.floats(0, 2 * TTL), jump=st.floats(-1e7, 0))
def test_a_control_process_that_dies(context: Context, clocks: Clocks, elapsed: float, jump: float) -> None:
    """A lifetime goes on; a clock that is set back meanwhile adds no more than the time to live."""
    entry = held(context, lifetime.make(TTL, None), clocks.wall)
    assert lifetime.ended(context) == []
    clocks.wait(elapsed)
    clocks.wall += jump
    clocks.restart()
    if jump == 0:
        assert bool(lifetime.ended(context)) == (entry.expires is not None and clocks.wall >= entry.expires)
    else:
        lifetime.ended(context)
    clocks.wait(TTL)
    assert ids(lifetime.ended(context)) == [entry.id]
    context.catalogue.remove_snapshot(entry.id)


def sleeping() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "600"])


def test_its_process_ends_it_reaped_or_not(context: Context) -> None:
    process = sleeping()
    try:
        entry = held(context, lifetime.make(None, process.pid))
        both = held(context, lifetime.make(TTL, process.pid), time.time())
        assert lifetime.ended(context) == []
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not reaped
        assert sorted(ids(lifetime.ended(context))) == sorted([entry.id, both.id])
        with pytest.raises(UsageError, match="no such process"):
            lifetime.make(None, process.pid)
        with pytest.raises(NotFound, match="its time is over"):
            lifetime.renew(context, both, TTL)
    finally:
        process.kill()
        process.wait()
    assert len(lifetime.ended(context)) == 2


def test_another_process_of_the_same_number(context: Context) -> None:
    entry = held(context, lifetime.make(None, os.getpid()))
    assert lifetime.ended(context) == []
    assert entry.while_pid_start is not None
    context.catalogue.put_snapshot(msgspec.structs.replace(entry, while_pid_start=entry.while_pid_start - 1))
    assert ids(lifetime.ended(context)) == [entry.id]


def test_a_command_of_any_name(context: Context, tmp_path: Path) -> None:
    name = tmp_path / "a) S 1 (b"
    os.symlink("/bin/sleep", name)
    process = subprocess.Popen([name, "600"])
    try:
        held(context, lifetime.make(None, process.pid))
        assert lifetime.ended(context) == []
    finally:
        process.kill()
        process.wait()
    assert len(lifetime.ended(context)) == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="knows the number of the system call on x86_64 only")
def test_a_process_whose_first_thread_has_ended(context: Context) -> None:
    """It looks like a zombie, and lives."""
    code = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); "
    process = subprocess.Popen([sys.executable, "-c", code + "ctypes.CDLL(None).syscall(60, 0)"])
    try:
        end = time.monotonic() + PATIENCE
        while b") Z " not in Path(f"/proc/{process.pid}/stat").read_bytes():
            assert time.monotonic() < end
            time.sleep(0.01)
        held(context, lifetime.make(None, process.pid))
        assert lifetime.ended(context) == []
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert len(lifetime.ended(context)) == 1
    finally:
        process.kill()
        process.wait()
