# SPDX-License-Identifier: MIT
"""When a difference storage will be full, from how fast it filled of late."""

from __future__ import annotations

import threading
import time
from collections import deque

WINDOW = 30.0
"""Seconds that are looked back."""


class Forecasts:
    """Readings of how much of each storage is used, by its key. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readings: dict[str, deque[tuple[float, int]]] = {}

    def read(self, storage: str, used: int) -> None:
        """Remember that `used` bytes are used now."""
        now = time.monotonic()
        with self._lock:
            readings = self._readings.setdefault(storage, deque())
            readings.append((now, used))
            while len(readings) > 2 and readings[1][0] < now - WINDOW:
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
            then, before = readings[0]
        grown, seconds = used - before, time.monotonic() - then
        if grown <= 0 or seconds <= 0:
            return None
        return round((capacity - used) / (grown / seconds), 1)
