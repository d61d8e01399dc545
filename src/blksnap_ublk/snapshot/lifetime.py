# SPDX-License-Identifier: MIT
"""Snapshots that end by themselves: after a time to live, or with the process that they were taken for.

The catalogue keeps when a snapshot expires (wall clock), and pid and start time of its process, so that lifetimes go on
when the control process is killed. While it lives, the time that is left is measured by a clock that nobody sets: a
wall clock that jumps neither ends a snapshot nor keeps it.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from blksnap_ublk.errors import NotFound, UsageError
from blksnap_ublk.forms import timestamp
from blksnap_ublk.snapshot import naming
from blksnap_ublk.snapshot.catalogue import Phase, SnapshotEntry
from blksnap_ublk.snapshot.context import Context

LONGEST_TTL = 366 * 86400.0
"""Seconds."""

_PID_LIMIT = 1 << 22
# Fields of /proc/PID/stat after the name of the command.
_STATE, _THREADS, _START = 0, 17, 19


@dataclass(frozen=True)
class Lifetime:
    """What ends a snapshot by itself, apart from its user; with both the first of them does.

    `ttl` in seconds; `while_pid_start` is the start time of the process in clock ticks since the machine started, so
    that another process of the same number is not taken for it.
    """

    ttl: float | None = None
    while_pid: int | None = None
    while_pid_start: int | None = None

    def expires(self, now: float) -> float | None:
        """When a snapshot that is taken or renewed `now` ends, in seconds since the epoch; None: not by time."""
        return None if self.ttl is None else now + self.ttl


def make(ttl: float | None, while_pid: int | None) -> Lifetime:
    """The lifetime of a snapshot to be taken. `ttl` in seconds.

    Raises UsageError for a time that is none, and for a process that does not run.
    """
    if ttl is not None:
        _check_ttl(ttl)
    start = None
    if while_pid is not None:
        start = _start_time(while_pid) if 0 < while_pid <= _PID_LIMIT else None
        if start is None:
            raise UsageError("no such process", subject=f"--while-pid {while_pid}", advice="give one that runs")
    return Lifetime(ttl, while_pid, start)


def renew(context: Context, snapshot: SnapshotEntry, ttl: float | None = None) -> SnapshotEntry:
    """The snapshot lasts for its time to live from now on, or for `ttl` seconds, which is its time to live then.

    Raises UsageError when it has none and none is given, NotFound when it has gone or its time is over, OSError.
    """
    if ttl is not None:
        _check_ttl(ttl)
    with context.locks.holding(snapshot.members):
        entry = context.catalogue.snapshot(snapshot.id)
        if entry is None or entry.phase is not Phase.ACTIVE:
            raise NotFound("no such snapshot", subject=snapshot.id, advice="it has been destroyed meanwhile")
        lasts = entry.ttl if ttl is None else ttl
        if lasts is None:
            raise UsageError("has no time to live", subject=f"snapshot {entry.id}", advice="give --ttl TIME")
        expires = time.time() + lasts
        renewed = msgspec.structs.replace(entry, ttl=lasts, expires=expires)
        with _lock:
            if _is_over(entry):
                raise NotFound("its time is over", subject=f"snapshot {entry.id}", advice="it is being destroyed")
            context.catalogue.put_snapshot(renewed)
            _deadlines[entry.id] = _Deadline(expires, _clock() + lasts)
    context.emit("renewed", snapshot=renewed.id, device=naming.only_device(renewed), expires=timestamp(expires))
    return renewed


def ended(context: Context) -> list[SnapshotEntry]:
    """The snapshots whose time is over, oldest first. They cannot be renewed any more: the caller destroys them."""
    held = naming.held_snapshots(context.catalogue)
    with _lock:
        known = {entry.id for entry in held}
        for gone in _deadlines.keys() - known:
            del _deadlines[gone]
        _over.intersection_update(known)
        return [entry for entry in held if _is_over(context.catalogue.snapshot(entry.id))]


@dataclass(frozen=True)
class _Deadline:
    """`expires` of the entry for which it was found, and the same on `_clock`."""

    expires: float
    at: float


# By snapshot id. What only this process knows: after its death it is found again from the catalogue.
_deadlines: dict[str, _Deadline] = {}
_over: set[str] = set()
_lock = threading.Lock()


def _clock() -> float:
    """Seconds that go on while the machine sleeps, and that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _is_over(entry: SnapshotEntry | None) -> bool:
    """Once it is, it stays so. For a caller that holds `_lock`."""
    if entry is None:
        return False
    if entry.id not in _over and (_has_expired(entry) or _has_lost_its_process(entry)):
        _over.add(entry.id)
    return entry.id in _over


def _has_expired(entry: SnapshotEntry) -> bool:
    if entry.expires is None:
        return False
    deadline = _deadlines.get(entry.id)
    if deadline is None or deadline.expires != entry.expires:
        left = max(0.0, entry.expires - time.time())
        # A wall clock that was set back must not keep it for longer than it was to live.
        left = left if entry.ttl is None else min(left, entry.ttl)
        deadline = _deadlines[entry.id] = _Deadline(entry.expires, _clock() + left)
    return _clock() >= deadline.at


def _has_lost_its_process(entry: SnapshotEntry) -> bool:
    return entry.while_pid is not None and _start_time(entry.while_pid) != entry.while_pid_start


def _start_time(pid: int) -> int | None:
    """The start time of a process that runs, in clock ticks; None for one that has ended, reaped or not."""
    try:
        # The name of the command may hold blanks and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A first thread that has ended before others looks like a process that nobody has reaped.
    if fields[_STATE] in (b"Z", b"X") and int(fields[_THREADS]) <= 1:
        return None
    return int(fields[_START])


def _check_ttl(ttl: float) -> None:
    if not math.isfinite(ttl) or ttl <= 0 or ttl > LONGEST_TTL:
        days = round(LONGEST_TTL / 86400)
        raise UsageError(f"{ttl:g} seconds is no time to live", subject="--ttl", advice=f"give up to {days} days")
