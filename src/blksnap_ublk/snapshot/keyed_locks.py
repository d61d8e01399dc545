# SPDX-License-Identifier: MIT
"""Locks that come and go with what they are for."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field


class KeyedLocks:
    """One lock for each key, which exists while somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._own = threading.Lock()
        self._locks: dict[str, _Counted] = {}

    @contextmanager
    def holding(self, keys: Iterable[str]) -> Iterator[None]:
        """Holds the locks of some keys, taken in their order, so that several callers never wait for one another."""
        with ExitStack() as stack:
            for key in sorted(set(keys)):
                stack.enter_context(self._holding(key))
            yield

    @contextmanager
    def trying(self, keys: Iterable[str]) -> Iterator[bool]:
        """The same, but that it waits for nobody: False, and nothing is held, where somebody else holds one."""
        with ExitStack() as stack:
            yield all(stack.enter_context(self._holding(key, wait=False)) for key in sorted(set(keys)))

    @contextmanager
    def _holding(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        with self._own:
            counted = self._locks.setdefault(key, _Counted())
            counted.users += 1
        held = False
        try:
            held = counted.lock.acquire(blocking=wait)
            yield held
        finally:
            if held:
                counted.lock.release()
            with self._own:
                counted.users -= 1
                if counted.users == 0:
                    del self._locks[key]


@dataclass
class _Counted:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
