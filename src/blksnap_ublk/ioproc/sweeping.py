# SPDX-License-Identifier: MIT
"""What a former io process left: stored where it was not yet, checked in slices between messages, then what it did not
use is free.
"""

import errno
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from blksnap_ublk.engine import BUFFERS_BYTES, Storing, Sweep, Thread
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.devices import expect
from blksnap_ublk.ioproc.images import Images
from blksnap_ublk.ioproc.state_map import StateMap
from blksnap_ublk.ioproc.storages import DifferenceStorage, MapMemory, Storages
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.rpc.loop import Loop

log = logging.getLogger(__name__)

SLICE = 0.01
STORE_LIMIT = 30.0
"""Seconds for storages to take what was not stored, as for any copy."""
AGAIN = 1.0
STOP_LIMIT_MS = 100  # other messages wait meanwhile


class Sweeping:
    """One sweep for all that is adopted. `done()` is called at its end; `start_thread()` starts a queue thread."""

    def __init__(
        self,
        loop: Loop,
        storages: Storages,
        images: Images,
        map_memory: MapMemory,
        done: Callable[[], None],
        start_thread: Callable[[], Thread],
    ) -> None:
        self._loop = loop
        self._start_thread = start_thread
        self._storages = storages
        self._images = images
        self._map_memory = map_memory
        self._done = done
        self._unstored: dict[str, StateMap] = {}
        self._storing: list[tuple[DifferenceStorage, Storing]] | None = None
        self._thread: Thread | None = None
        self._store_until = 0.0
        self._sweep: Sweep | None = None
        self._lost: list[int] = []
        self._ended = False
        self._quarantine_ended = False

    @property
    def swept(self) -> bool:
        """Whether nothing that was adopted waits for the end of a sweep."""
        return self._ended or not (self._map_memory.adopted or self._images.unswept() or self._storages.adopted())

    def add_unstored(self, message: messages.Unstored, descriptors: Descriptors) -> None:
        """What it has already is passed over. Raises OSError; EALREADY after `begin`, EBADMSG for short files."""
        self._refuse_begun()
        expect(descriptors, len(message.buffers), message)
        for index, name in enumerate(message.buffers):
            if name not in self._unstored:
                self._unstored[name] = StateMap(descriptors[index], BUFFERS_BYTES, f"buffers {name}")

    def begin(self, message: messages.Sweep) -> None:
        """Raises OSError; EALREADY for a second one."""
        self._refuse_begun()
        adopted = self._storages.adopted()
        if self._unstored and adopted:
            # Before anything changes: where it cannot be started, the message may be sent again.
            self._thread = self._start_thread()
        self._lost = message.lost
        self._store_until = time.monotonic() + STORE_LIMIT
        self._storing = [each for storage in adopted for each in self._begin_storing(storage)]
        self._loop.later(0, self._store)

    def _begin_storing(self, storage: DifferenceStorage) -> list[tuple[DifferenceStorage, Storing]]:
        begun: list[tuple[DifferenceStorage, Storing]] = []
        try:
            for buffers in self._unstored.values():
                assert self._thread is not None
                begun.append((storage, Storing(self._thread, storage.storage, buffers.memory)))
        except OSError as error:
            self._lose(storage, error.errno or errno.EIO)
        return begun

    def _lose(self, storage: DifferenceStorage, error: int) -> None:
        log.error("storage %s: what was to be kept in it cannot be stored", storage.name)
        self._images.break_storage(messages.BreakStorage(storage.name, error))

    def _refuse_begun(self) -> None:
        if self._storing is not None or self._ended:
            raise OSError(errno.EALREADY, "what was adopted has been swept, or is about to be")

    def _store(self) -> None:
        """Waits until all is stored that was released early; then the sweep begins."""
        assert self._storing is not None
        late = any(storing.result is None for _, storing in self._storing)
        if late and time.monotonic() < self._store_until:
            self._loop.later(SLICE, self._store)
            return
        for storage, storing in self._storing:
            error = errno.ETIMEDOUT if storing.result is None else storing.result
            if error:
                self._lose(storage, error)
        self._end_storing()
        self._begin_sweep()

    def _begin_sweep(self) -> None:
        try:
            self._sweep = Sweep(
                self._map_memory.arena,
                [each.storage for each in self._storages.adopted()],
                [each.image for each in self._images.unswept()],
                lost=self._lost,
            )
        except OSError as error:
            log.error("what the former io process left cannot be checked yet: %s", error)
            self._loop.later(AGAIN, self._begin_sweep)
            return
        self._go_on()

    def end_quarantine(self) -> None:
        """At once, or after the sweep."""
        self._quarantine_ended = True
        if self.swept:
            self._free()

    def _end_storing(self) -> None:
        """What a silent storage does not take is in use until it does; so is the storage."""
        assert self._storing is not None
        late = []
        for storage, storing in self._storing:
            if storing.result is None:
                late.append((storage, storing))
            else:
                storing.close()
        self._storing = late
        if not late and self._thread is not None:
            with suppress(TimeoutError):
                self._thread.stop(timeout_ms=STOP_LIMIT_MS)
                self._thread = None
        if late or self._thread is not None:
            self._loop.later(AGAIN, self._end_storing)
            return
        for buffers in self._unstored.values():
            buffers.close()
        self._unstored = {}

    def _go_on(self) -> None:
        assert self._sweep is not None
        if not self._sweep.run(SLICE):
            self._loop.later(0, self._go_on)
            return
        self._sweep.close()
        self._sweep = None
        self._ended = True
        self._map_memory.adopted = False
        for image in self._images.unswept():
            image.unswept = False
        self._images.log_broken()
        if self._quarantine_ended:
            self._free()
        log.info("what the former io process left has been checked")
        self._done()

    def _free(self) -> None:
        for each in self._storages.adopted():
            each.storage.end_quarantine()
            each.adopted = False
