# SPDX-License-Identifier: MIT
"""The eventfd of the control process that this process rings."""

import os
from contextlib import suppress

from blksnap_ublk import engine
from blksnap_ublk.rpc.descriptors import Descriptors


class Doorbell:
    """None until a connection brings one; the latest counts. Threads of the engine ring it at any time."""

    def __init__(self) -> None:
        self._descriptor = -1

    def become(self, descriptors: Descriptors) -> None:
        """The first of `descriptors`, if there is one. Raises OSError."""
        if not len(descriptors):
            return
        if self._descriptor < 0:
            self._descriptor = os.dup(descriptors[0])
            os.set_inheritable(self._descriptor, False)
            engine.set_doorbell(self._descriptor)
        else:
            # The number stays: a thread may be about to write to it.
            os.dup2(descriptors[0], self._descriptor, inheritable=False)

    def ring(self) -> None:
        """There is something to look at."""
        if self._descriptor >= 0:
            with suppress(BlockingIOError):
                os.eventfd_write(self._descriptor, 1)

    def close(self) -> None:
        """When no thread of the engine is left that could ring."""
        engine.set_doorbell(-1)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
