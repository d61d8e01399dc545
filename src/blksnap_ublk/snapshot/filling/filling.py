# SPDX-License-Identifier: MIT
"""The thread that looks after all difference storages while they fill."""

from __future__ import annotations

import logging
import threading
import time

from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.filling.one_storage import Forecasts, OneStorage

LOOK = 0.25
"""Seconds between two looks, where the io process has nothing to tell before."""

_END = 5.0  # seconds for growth and evictions under way at the end
_log = logging.getLogger(__name__)


class Filling:
    """Runs from `start` to `stop`."""

    def __init__(self, context: Context, forecasts: Forecasts) -> None:
        self._context = context
        self._forecasts = forecasts
        self._storages: dict[str, OneStorage] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="filling", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Returns when it has ended; growth that waits for a file system is left alone."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        end = time.monotonic() + _END
        for storage in self._storages.values():
            storage.wait_until(end)

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                if self._context.io.lost():
                    self._ending.wait(LOOK)
                    continue
                self._context.io.bell(LOOK)
                self._look()
            except (BlksnapError, OSError) as error:
                _log.error("%s", error)
                self._ending.wait(LOOK)
            except Exception:
                _log.exception("unexpected error; going on")
                self._ending.wait(LOOK)

    def _look(self) -> None:
        keys = [storage.key for storage in self._context.catalogue.storages()]
        self._forecasts.keep_only(set(keys))
        for key in self._storages.keys() - set(keys):
            del self._storages[key]
            self._context.reach.pop(key, None)
        for key in keys:
            if key not in self._storages:
                self._storages[key] = OneStorage(self._context, key, self._forecasts)
            try:
                self._storages[key].look()
            except (BlksnapError, OSError) as error:
                _log.error("storage %s: %s", key, error)
