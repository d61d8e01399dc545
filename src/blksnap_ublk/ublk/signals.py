# SPDX-License-Identifier: MIT
"""SIGINT and SIGTERM for a server: the first asks it to end, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)


class TwoSignals:
    """While entered, takes SIGINT and SIGTERM. Main thread only."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> TwoSignals:
        for number in _ENDING:
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, timeout: float) -> bool:
        """Whether the first signal has come; waits for it `timeout` seconds at most."""
        return self._asked.wait(timeout)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            os._exit(128 + number)
        self._asked.set()
