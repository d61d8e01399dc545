# SPDX-License-Identifier: MIT
"""What is done for one difference storage while it fills."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from blksnap_ublk.errors import BlksnapError, from_os_error
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import broken, destroy, naming, overflow, releasing
from blksnap_ublk.snapshot.catalogue import Phase, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.filling import growing
from blksnap_ublk.snapshot.filling.damage import Damage, DamageSearch
from blksnap_ublk.snapshot.filling.evicting import victim
from blksnap_ublk.snapshot.filling.job import Job
from blksnap_ublk.snapshot.filling.rate import Rate
from blksnap_ublk.snapshot.state_files import ImageStatus, StorageState
from blksnap_ublk.snapshot.storage import behaviour
from blksnap_ublk.snapshot.storage.behaviour import Facts

GROW_AGAIN = 2.0  # seconds until growth that failed is tried again
EVICT_FAILED_AGAIN = 2.0  # seconds from the begin of an eviction that fails to the next
EVICT_AGAIN = 0.25  # seconds from the end of an eviction to the next: its places may come free a little later
FINISH_AGAIN = 2.0  # seconds from one attempt to give its files back to the next
SEARCH_EVERY = 1.0  # seconds between two looks for damage
FORECAST_EVERY = 0.5  # seconds between two readings for the forecast
SETTLE = 2.0  # seconds after an eviction in which writers still wait for its places
STUCK = 8.0  # seconds after which an attempt to grow counts as failed, though it goes on
_log = logging.getLogger(__name__)


class Forecasts(Protocol):
    """When a storage will be full, from readings of how much is used, in bytes."""

    def read(self, storage: str, used: int) -> None: ...

    def keep_only(self, storages: set[str]) -> None: ...

    def seconds_left(self, storage: str, used: int, capacity: int) -> float | None: ...


class OneStorage:
    """`look` is called by one thread, again and again; what may take long is done in threads of its own."""

    def __init__(self, context: Context, key: str, forecasts: Forecasts) -> None:
        self._context = context
        self._key = key
        self._forecasts = forecasts
        self._rate = Rate()
        self._growth = Job(f"growth of storage {key}")
        self._eviction = Job(f"eviction from storage {key}")
        self._search = DamageSearch()
        self._failed = self._stuck = False
        self._grow_at = self._search_at = self._read_at = 0.0
        self._evict_at = self._evicted_until = self._finish_at = 0.0
        self._told = 0
        self._evicted: set[str] = set()
        self._damages: set[Damage] = set()
        self._broken: set[tuple[int, Damage]] = set()
        self._waiting = False
        self._sent: tuple[int, messages.SetStorage] | None = None

    def look(self) -> None:
        """Raises Failed when the io process has gone."""
        storage = self._context.catalogue.storage(self._key)
        if storage is not None and storage.released:
            self._finish(time.monotonic())
            return
        state = self._context.state.storage_state(naming.storage_state_name(self._key))
        if storage is None or state is None or self._key not in self._context.open_storages:
            return
        now = time.monotonic()
        self._read(now, state.used * storage.unit)
        snapshots = naming.snapshots_in(self._context.catalogue, self._key)
        lost = {entry.id for entry in snapshots if self._is_lost(entry)}
        if len(lost) == len(snapshots):
            return
        # Writers must wait as soon as a snapshot has been taken that can be the one that stays.
        evictable = victim(snapshots, lost, writers_wait=state.waiting > 0, coming=True) is not None
        facts = self._facts(storage, state, snapshots, evictable=evictable)
        decision = behaviour.decide(facts)
        self._tell_io(storage, decision)
        self._tell_waiting(facts, snapshots)
        if not decision.grow:
            self._failed = False  # not wanted at present
        elif now >= self._grow_at:
            self._growth.start(partial(self._grow, decision.grow))
        if decision.evict and now >= self._evict_at:
            self._eviction.start(partial(self._evict, facts))
        if now >= self._search_at and self._growth.start(partial(self._look_for_damage, storage)):
            self._search_at = now + SEARCH_EVERY

    def _finish(self, now: float) -> None:
        """Gives its files back, unless who destroyed the last snapshot does that at present."""
        if now >= self._finish_at and self._growth.start(self._give_back):
            self._finish_at = now + FINISH_AGAIN

    def _give_back(self) -> None:
        for warning in releasing.finish(self._context, self._key):
            _log.warning("%s", warning)

    def wait_until(self, end: float) -> None:
        """For what is under way, until that time of the monotonic clock."""
        for job in (self._growth, self._eviction):
            job.wait(max(end - time.monotonic(), 0.0))

    def _read(self, now: float, used: int) -> None:
        self._rate.read(now, used)
        if now >= self._read_at:
            self._forecasts.read(self._key, used)
            self._read_at = now + FORECAST_EVERY

    def _facts(
        self, storage: StorageEntry, state: StorageState, snapshots: Sequence[SnapshotEntry], *, evictable: bool
    ) -> Facts:
        """What is known, after the users were told of it."""
        room = growing.room(self._context, storage)
        stuck = self._growth.seconds > STUCK
        if stuck and not self._stuck:
            self._tell_failed(snapshots, f"its file system has not answered for {STUCK:.0f} s")
        self._stuck = stuck
        failed = stuck or self._failed
        used = state.used * storage.unit
        reach = storage.capacity + (0 if failed else room.there)
        self._context.reach[self._key] = reach
        self._warn(storage, snapshots, used, reach)
        return Facts(
            unit=storage.unit,
            capacity=state.capacity * storage.unit,
            used=used,
            room=room.allowed,
            on_overflow=overflow.parse(storage.on_overflow),
            rest=storage.limit is not None,
            rate=self._rate.per_second(),
            waiting=state.waiting,
            failed=failed,
            written=self._is_written(snapshots),
            evictable=evictable,
            evicting=self._eviction.running or time.monotonic() < self._evicted_until,
            told=self._told,
        )

    def _is_lost(self, entry: SnapshotEntry) -> bool:
        return entry.phase is Phase.DESTROYING or not self._is_taken(entry) or broken.is_broken(self._context, entry)

    def _is_taken(self, entry: SnapshotEntry) -> bool:
        states = [self._context.state.image_state(naming.image_state_name(image)) for image in entry.images]
        return bool(states) and all(found is not None and found.status is not ImageStatus.NEW for found in states)

    def _is_written(self, snapshots: Sequence[SnapshotEntry]) -> bool:
        states = (
            self._context.state.image_state(naming.image_state_name(image))
            for entry in snapshots
            for image in entry.images
        )
        return any(found is not None and found.written for found in states)

    def _tell_io(self, storage: StorageEntry, decision: behaviour.Behaviour) -> None:
        """How the storage is to behave, when that has changed or the io process is another."""
        rate = storage.copy_rate or 0
        message = messages.SetStorage(self._key, wait_ms=decision.wait_ms, low=decision.low, rate=rate)
        wanted = (self._context.io.pid, message)
        if wanted == self._sent:
            return
        try:
            self._context.io.call(message)
        except IoRefused as error:
            if error.errno != errno.ENOENT:  # it is about to go
                raise
            return
        self._sent = wanted

    def _tell_waiting(self, facts: Facts, snapshots: Sequence[SnapshotEntry]) -> None:
        pause = facts.on_overflow.action is overflow.Action.PAUSE
        waits = pause and facts.waiting > 0 and (facts.failed or facts.room < facts.unit)
        if waits and not self._waiting:
            self._waiting = True
            self._emit("storage-waiting", snapshots, seconds=facts.on_overflow.seconds)
        elif self._waiting and facts.waiting == 0 and facts.used < facts.capacity:
            self._waiting = False
            self._emit("storage-resumed", snapshots)

    def _warn(self, storage: StorageEntry, snapshots: Sequence[SnapshotEntry], used: int, reach: int) -> None:
        levels, self._told = behaviour.levels_reached(used, reach, self._told)
        for level in levels:
            self._emit(
                "storage-low",
                snapshots,
                percent=level,
                used=used,
                capacity=storage.capacity,
                limit=storage.limit,
                forecast_seconds=self._forecasts.seconds_left(self._key, used, reach),
            )

    def _grow(self, wanted: int) -> None:
        snapshots = naming.snapshots_in(self._context.catalogue, self._key)
        try:
            added = growing.grow(self._context, self._key, wanted)
        except (BlksnapError, OSError) as error:
            self._grow_at = time.monotonic() + GROW_AGAIN
            if not self._failed:
                failure = error if isinstance(error, BlksnapError) else from_os_error(error)
                self._tell_failed(snapshots, failure.message)
            self._failed = True
            return
        self._failed = False
        storage = self._context.catalogue.storage(self._key)
        if added and storage is not None:
            _log.info("storage %s has grown by %d to %d bytes", self._key, added, storage.capacity)
            self._emit("storage-grown", snapshots, bytes=added, capacity=storage.capacity)

    def _tell_failed(self, snapshots: Sequence[SnapshotEntry], error: str) -> None:
        _log.error("storage %s does not grow: %s", self._key, error)
        self._emit("storage-grow-failed", snapshots, error=error)

    def _evict(self, facts: Facts) -> None:
        self._evict_at = time.monotonic() + EVICT_FAILED_AGAIN
        here = naming.snapshots_in(self._context.catalogue, self._key)
        # With these nobody else can end a snapshot of the storage.
        keys = {key for entry in here for key in destroy.devices_of(self._context, entry)}
        with self._context.locks.holding(keys):
            entry = self._victim(facts)
            if entry is None:
                self._evict_at = time.monotonic() + EVICT_AGAIN
                return
            _log.warning("snapshot %s: evicted, its difference storage is full", entry.id)
            if entry.id not in self._evicted:
                self._evicted.add(entry.id)
                sizes = {"used": facts.used, "capacity": facts.capacity}
                self._context.emit("evicted", snapshot=entry.id, device=naming.only_device(entry), **sizes)
            for warning in destroy.destroy_locked(self._context, entry, force=True):
                _log.warning("%s", warning)
        self._evicted_until = time.monotonic() + SETTLE
        self._evict_at = time.monotonic() + EVICT_AGAIN

    def _victim(self, facts: Facts) -> SnapshotEntry | None:
        """As it is now; others may have ended snapshots."""
        snapshots = naming.snapshots_in(self._context.catalogue, self._key)
        lost = {entry.id for entry in snapshots if self._is_lost(entry)}
        return victim(snapshots, lost, writers_wait=facts.waiting > 0)

    def _look_for_damage(self, storage: StorageEntry) -> None:
        snapshots = naming.snapshots_in(self._context.catalogue, self._key)
        for found in self._search.look(self._context, storage, time.monotonic()):
            if found not in self._damages:
                self._damages.add(found)
                _log.error("%s: %s", found.path, found.error)
                self._emit("storage-damaged", snapshots, path=found.path, error=found.error)
            # Every io process has to hear of it.
            told = (self._context.io.pid, found)
            if found.errno is not None and told not in self._broken:
                self._context.io.call(messages.BreakStorage(self._key, found.errno))
                self._broken.add(told)

    def _emit(self, kind: str, snapshots: Sequence[SnapshotEntry], **data: object) -> None:
        for entry in snapshots:
            if entry.phase is Phase.ACTIVE:
                self._context.emit(kind, snapshot=entry.id, device=naming.only_device(entry), **data)
