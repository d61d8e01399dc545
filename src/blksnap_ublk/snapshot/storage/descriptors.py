# SPDX-License-Identifier: MIT
"""One descriptor for each file and block device of difference storage, shared by all areas in it.

A second exclusive open of a block device, or a second lock of a file, fails even in one process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from blksnap_ublk.snapshot.keyed_locks import KeyedLocks
from blksnap_ublk.snapshot.storage.areas import Identity


@dataclass
class _Shared:
    descriptor: int
    users: int


class DescriptorRegistry:
    """Counts the users of each descriptor and closes it with the last one. May be called from any thread.

    Opening and closing one of them may take long, and then keeps only those waiting who want the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changing = KeyedLocks()
        self._shared: dict[Identity, _Shared] = {}

    def acquire(self, identity: Identity, opener: Callable[[], int]) -> int:
        """The descriptor of `identity`, from `opener()` if there is none yet; to be given back by `release`."""
        with self._changing.holding([str(identity)]):
            found = self._use(identity)
            return self._add(identity, opener()) if found is None else found

    def adopt(self, identity: Identity, descriptor: int) -> int:
        """Takes over a descriptor that another process kept open; the one already here wins. Acquires it."""
        with self._changing.holding([str(identity)]):
            found = self._use(identity)
            if found is None:
                return self._add(identity, descriptor)
            if found != descriptor:
                os.close(descriptor)
            return found

    def release(self, identity: Identity) -> None:
        """Ends one use; the last one closes the descriptor. Raises KeyError for what is not held."""
        with self._changing.holding([str(identity)]):
            with self._lock:
                shared = self._shared[identity]
                shared.users -= 1
                if shared.users:
                    return
                del self._shared[identity]
            os.close(shared.descriptor)

    def held(self) -> frozenset[Identity]:
        """Everything that has a descriptor here."""
        with self._lock:
            return frozenset(self._shared)

    def _use(self, identity: Identity) -> int | None:
        with self._lock:
            shared = self._shared.get(identity)
            if shared is None:
                return None
            shared.users += 1
            return shared.descriptor

    def _add(self, identity: Identity, descriptor: int) -> int:
        with self._lock:
            self._shared[identity] = _Shared(descriptor, 1)
        return descriptor
