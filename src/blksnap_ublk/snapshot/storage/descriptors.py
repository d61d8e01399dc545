# SPDX-License-Identifier: MIT
"""One descriptor for each file and block device of difference storage, shared by all areas in it.

A second exclusive open of a block device, or a second lock of a file, fails even in one process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from blksnap_ublk.snapshot.storage.areas import Identity


@dataclass
class _Shared:
    descriptor: int
    users: int


class DescriptorRegistry:
    """Counts the users of each descriptor and closes it with the last one. May be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: dict[Identity, _Shared] = {}

    def acquire(self, identity: Identity, opener: Callable[[], int]) -> int:
        """The descriptor of `identity`, from `opener()` if there is none yet; to be given back by `release`."""
        with self._lock:
            shared = self._shared.get(identity)
            if shared is None:
                shared = self._shared[identity] = _Shared(opener(), 0)
            shared.users += 1
            return shared.descriptor

    def adopt(self, identity: Identity, descriptor: int) -> int:
        """Takes over a descriptor that another process kept open; the one already here wins. Acquires it."""
        with self._lock:
            shared = self._shared.get(identity)
            if shared is None:
                shared = self._shared[identity] = _Shared(descriptor, 0)
            elif shared.descriptor != descriptor:
                os.close(descriptor)
            shared.users += 1
            return shared.descriptor

    def release(self, identity: Identity) -> None:
        """Ends one use; the last one closes the descriptor. Raises KeyError for what is not held."""
        with self._lock:
            shared = self._shared[identity]
            shared.users -= 1
            if shared.users == 0:
                del self._shared[identity]
                os.close(shared.descriptor)

    def held(self) -> frozenset[Identity]:
        """Everything that has a descriptor here."""
        with self._lock:
            return frozenset(self._shared)
