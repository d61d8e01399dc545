# SPDX-License-Identifier: MIT
"""Storing what a former io process had released early: a thread for each storage, because one may not answer."""

import errno
import logging
import threading
from collections.abc import Sequence

from blksnap_ublk.ioproc.state_map import StateMap
from blksnap_ublk.ioproc.storages import DifferenceStorage

log = logging.getLogger(__name__)


class Storing:
    """Begins at once. `error`: an errno when something could not be stored, 0 otherwise, once `thread` has ended."""

    def __init__(self, storage: DifferenceStorage, buffers: Sequence[StateMap]) -> None:
        self.storage = storage
        self.error = 0
        self._buffers = buffers
        self.thread = threading.Thread(target=self._run, name="storing", daemon=True)
        storage.storing = self.thread
        self.thread.start()

    def _run(self) -> None:
        for each in self._buffers:
            try:
                self.storage.storage.store_unstored(each.memory)
            except OSError as error:
                log.error("storage %s: %s", self.storage.name, error)
                self.error = error.errno or errno.EIO
