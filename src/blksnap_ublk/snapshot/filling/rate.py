# SPDX-License-Identifier: MIT
"""How fast a difference storage fills at present."""

from __future__ import annotations

from collections import deque

SHORT = 1.0
LONG = 4.0
"""Seconds that are looked back; the faster of the two is the rate, so that a burst is seen at once and remembered."""

_LEAST = 0.25  # seconds that a rate is taken over


class Rate:
    """From readings of how much is used. Places that are given back do not count against those that are taken."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque()
        self._used = 0

    def read(self, now: float, used: int) -> None:
        """`used` bytes are used at `now`, in seconds of any clock that only goes forward."""
        taken = self._readings[-1][1] + max(used - self._used, 0) if self._readings else 0
        self._used = used
        self._readings.append((now, taken))
        while len(self._readings) > 2 and self._readings[1][0] <= now - LONG:
            self._readings.popleft()

    def per_second(self) -> float:
        """Bytes per second, 0 before there are two readings."""
        if len(self._readings) < 2:
            return 0.0
        now, taken = self._readings[-1]
        return max(self._over(SHORT, now, taken), self._over(LONG, now, taken))

    def _over(self, seconds: float, now: float, taken: int) -> float:
        then, before = next(reading for reading in self._readings if reading[0] >= now - seconds)
        return (taken - before) / max(now - then, _LEAST)
