# SPDX-License-Identifier: MIT
"""When a difference storage will be full, from how fast it filled of late."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import NamedTuple

WINDOW = 30.0
"""Seconds that are looked back."""


class _Reading(NamedTuple):
    """`taken`: all bytes that were taken so far; those that were given back are not subtracted."""

    time: float
    used: int
    taken: int


class Forecasts:
    """Readings of how much of each storage is used, by its key. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readings: dict[str, deque[_Reading]] = {}

    def read(self, storage: str, used: int) -> None:
        """Remember that `used` bytes are used now."""
        now = time.monotonic()
        with self._lock:
            readings = self._readings.setdefault(storage, deque())
            readings.append(_Reading(now, used, _taken(readings, used)))
            while len(readings) > 2 and readings[1].time < now - WINDOW:
                readings.popleft()

    def keep_only(self, storages: set[str]) -> None:
        """Forget all others."""
        with self._lock:
            for gone in self._readings.keys() - storages:
                del self._readings[gone]

    def seconds_left(self, storage: str, used: int, capacity: int) -> float | None:
        """Until it is full, at the present rate; None where nothing was written of late."""
        with self._lock:
            readings = self._readings.get(storage)
            if not readings:
                return None
            first, taken = readings[0], _taken(readings, used)
        grown, seconds = taken - first.taken, time.monotonic() - first.time
        if grown <= 0 or seconds <= 0:
            return None
        return round((capacity - used) / (grown / seconds), 1)


def _taken(readings: deque[_Reading], used: int) -> int:
    """When so many bytes are used after these readings."""
    return readings[-1].taken + max(used - readings[-1].used, 0) if readings else 0
