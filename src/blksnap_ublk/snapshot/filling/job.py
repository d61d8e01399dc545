# SPDX-License-Identifier: MIT
"""Something that may take long, or never end, done in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from blksnap_ublk.errors import BlksnapError

_log = logging.getLogger(__name__)


class Job:
    """One thing at a time. The end of the process does not wait for it, unless the kernel does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._since = 0.0

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """How long what runs has been running; 0 when nothing does."""
        return time.monotonic() - self._since if self.running else 0.0

    def start(self, what: Callable[[], None]) -> bool:
        """Begins, unless the former has not ended; whether it did. What it raises is logged."""
        if self.running:
            return False
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(what,), name=self._name, daemon=True)
        self._thread.start()
        return True

    def wait(self, seconds: float) -> None:
        """Until it has ended, or the time is over."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, what: Callable[[], None]) -> None:
        try:
            what()
        except (BlksnapError, OSError) as error:
            _log.error("%s: %s", self._name, error)
        except Exception:
            _log.exception("%s: unexpected error", self._name)
