# SPDX-License-Identifier: MIT
"""The thread that looks after what happens by itself: images that break, snapshots whose time is over, map memory, an
io process that dies."""

from __future__ import annotations

import logging
import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from blksnap_ublk.errors import BlksnapError, NotFound
from blksnap_ublk.snapshot import broken, destroy, lifetime, map_memory, naming
from blksnap_ublk.snapshot.catalogue import SnapshotEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.reconcile import clear_away, go_on, keep_again, reconcile

LOOK = 0.25  # seconds between two looks at the images
SOON = 0.02  # the same while something is on its way
FEED = 1.0  # seconds between two looks at map memory and times to live
END_AGAIN = 5.0  # seconds until a snapshot whose time is over, and that could not be destroyed, is tried again
ENDERS = 4  # snapshots that are destroyed at the same time because their time is over
TRY_AGAIN = 0.5  # seconds between two attempts to remove what is left of something
_log = logging.getLogger(__name__)


class Watch:
    """Runs from `start` to `stop`."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._fed = 0.0
        self._tried = time.monotonic()
        self._enders = ThreadPoolExecutor(ENDERS, thread_name_prefix="expiry")
        self._clearing: Future[None] | None = None
        self._io_missed = False
        self._keeper_missed = False
        self._ends_at: dict[str, float] = {}

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Returns when it has ended."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        self._enders.shutdown(cancel_futures=True)

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._look()
            except (BlksnapError, OSError) as error:
                _log.error("%s", error)
                self._ending.wait(1)
            except Exception:
                _log.exception("unexpected error; going on")
                self._ending.wait(1)

    def _look(self) -> None:
        if self._context.io.lost():
            if not self._io_missed:
                self._io_missed = True
                _log.error("the io process has gone")
                self._context.io_died = time.monotonic()
            reconcile(self._context)
            self._io_missed = False
            return
        self._look_for_keeper()
        soon = go_on(self._context)
        if time.monotonic() - self._tried > TRY_AGAIN and (self._clearing is None or self._clearing.done()):
            self._clearing = self._enders.submit(self._clear_away)
            self._tried = time.monotonic()
        held = naming.held_snapshots(self._context.catalogue)
        for entry in held:
            broken.tell(self._context, entry)
        if held and time.monotonic() - self._fed > FEED:
            self._fed = time.monotonic()
            self._end_expired()
            self._feed(held)
        self._context.io.lost(SOON if soon else LOOK)

    def _look_for_keeper(self) -> None:
        """The next one is not waited for: the io process may die meanwhile."""
        if not self._context.keeper.lost():
            return
        if not self._keeper_missed:
            self._keeper_missed = True
            _log.error("the keeper has gone")
        try:
            keep_again(self._context)
            self._keeper_missed = False
        except ConnectionError:
            pass
        except OSError as error:
            _log.error("the keeper: %s", error)

    def _clear_away(self) -> None:
        try:
            clear_away(self._context)
        except (BlksnapError, OSError) as error:
            _log.error("%s", error)
        except Exception:
            _log.exception("unexpected error; going on")

    def _end_expired(self) -> None:
        """In threads of their own: an end may have to wait, and map memory must not."""
        now = time.monotonic()
        over = lifetime.ended(self._context)
        for gone in self._ends_at.keys() - {entry.id for entry in over}:
            del self._ends_at[gone]
        for entry in over:
            if now < self._ends_at.get(entry.id, 0.0):
                continue
            if entry.id not in self._ends_at:
                self._context.emit("expired", snapshot=entry.id, device=naming.only_device(entry))
            self._ends_at[entry.id] = math.inf
            self._enders.submit(self._end, entry)

    def _end(self, entry: SnapshotEntry) -> None:
        _log.info("snapshot %s: its time is over", entry.id)
        try:
            # Its files are given back by others: that may wait for a file system, and other ends for this one.
            with self._context.locks.holding(destroy.devices_of(self._context, entry)):
                for warning in destroy.destroy_locked(self._context, entry, force=True):
                    _log.warning("%s", warning)
        except NotFound:
            pass
        except (BlksnapError, OSError) as error:
            _log.error("snapshot %s: its time is over, and it could not be destroyed: %s", entry.id, error)
            self._ends_at[entry.id] = time.monotonic() + END_AGAIN
        except Exception:
            _log.exception("snapshot %s: unexpected error; it will be tried again", entry.id)
            self._ends_at[entry.id] = time.monotonic() + END_AGAIN

    def _feed(self, held: list[SnapshotEntry]) -> None:
        if any(not broken.is_broken(self._context, entry) for entry in held):
            map_memory.ensure(self._context)
