# SPDX-License-Identifier: MIT
"""What a former io process left: checked in slices between messages, then what it did not use is free."""

import errno
import logging
from collections.abc import Callable

from blksnap_ublk.engine import Sweep
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.images import Images
from blksnap_ublk.ioproc.storages import MapMemory, Storages
from blksnap_ublk.rpc.loop import Loop

log = logging.getLogger(__name__)

SLICE = 0.01


class Sweeping:
    """One sweep for all that is adopted. `done()` is called at its end."""

    def __init__(
        self, loop: Loop, storages: Storages, images: Images, map_memory: MapMemory, done: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._storages = storages
        self._images = images
        self._map_memory = map_memory
        self._done = done
        self._sweep: Sweep | None = None
        self._ended = False
        self._quarantine_ended = False

    @property
    def swept(self) -> bool:
        """Whether nothing that was adopted waits for the end of a sweep."""
        return self._ended or not (self._map_memory.adopted or self._images.unswept() or self._storages.adopted())

    def begin(self, message: messages.Sweep) -> None:
        """Raises OSError; EALREADY for a second one."""
        if self._sweep is not None or self._ended:
            raise OSError(errno.EALREADY, "what was adopted has been swept, or is about to be")
        self._sweep = Sweep(
            self._map_memory.arena,
            [each.storage for each in self._storages.adopted()],
            [each.image for each in self._images.unswept()],
            lost=message.lost,
        )
        self._loop.later(0, self._go_on)

    def end_quarantine(self) -> None:
        """At once, or after the sweep."""
        self._quarantine_ended = True
        if self.swept:
            self._free()

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
