# SPDX-License-Identifier: MIT
"""The helper process that freezes file systems. Its parent is its watchdog, which thaws in its place if need be.

It is a process of its own because one that waits for a file system above its own device cannot be ended. It reads a
byte for each order ("freeze", then "thaw") and answers each step with one line of JSON. It thaws by itself when the
orders end, because the control process has died, and when its limit has passed. From the first freeze to the last
thaw it opens nothing, and its memory is locked: its own program may lie on what is frozen.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import time
from collections.abc import Sequence

from blksnap_ublk.host import superblock
from blksnap_ublk.snapshot.freeze_board import Board, Reason, Stage

_MCL_CURRENT, _MCL_FUTURE = 1, 2
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


def make_resident(name: str) -> None:
    """Locks the memory of this process and names it, up to 15 characters, for those who look for it with ps."""
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE)


class FreezerProcess:
    """`systems`: a descriptor of each file system in the order of freezing, or a negative errno."""

    def __init__(self, systems: Sequence[int], board: Board, limit: float, *, orders: int, answers: int) -> None:
        self._systems = systems
        self._board = board
        self._limit = limit
        self._orders = orders
        self._answers = answers

    def run(self, watchdog: int) -> int:
        """Does it all; the exit status. `watchdog` is readable once that is ready, and ends with it."""
        make_resident("bsu-freezer")
        try:
            return 0 if os.read(watchdog, 1) and self._work(watchdog) else 1
        finally:
            self._thaw()  # nothing is left, but after a failure

    def _work(self, watchdog: int) -> bool:
        self._answer({"freezer": os.getpid()})
        if not os.read(self._orders, 1):
            return True
        # What is dirty is written before anything is frozen, so that freezing itself is short.
        for system in self._systems:
            if system >= 0 and not self._is_alone():
                superblock.write_back(system)
        self._answer({"written": True})
        if _ended(watchdog) or self._is_alone():
            return False
        end = time.monotonic() + self._limit
        self._answer({"results": [self._freeze(n, end) for n in range(self._board.count)]})
        late = not select.select([self._orders], [], [], max(end - time.monotonic(), 0))[0]
        thawed = self._thaw()
        # EINVAL: somebody else has thawed it.
        late = late or self._board.reason is not Reason.NONE or errno.EINVAL in thawed.values()
        self._answer({"late": late, "thawed": thawed})
        return True

    def _freeze(self, n: int, end: float) -> int:
        system = self._systems[n]
        if system < 0:
            return -system
        if time.monotonic() >= end:
            return errno.ETIME
        if self._is_alone() or self._board.reason is not Reason.NONE:
            return errno.ECANCELED
        self._board.set_stage(n, Stage.FREEZING)
        result = superblock.freeze(system)
        self._board.set_stage(n, Stage.FAILED if result else Stage.FROZEN)
        return result

    def _thaw(self) -> dict[int, int]:
        """By the number of the file system, what thawing it gave."""
        results = {}
        for n in self._board.to_thaw():
            results[n] = superblock.thaw(self._systems[n])
            if results[n] in (0, errno.EINVAL):
                self._board.set_stage(n, Stage.THAWED)
        return results

    def _is_alone(self) -> bool:
        return _ended(self._orders)

    def _answer(self, value: dict[str, object]) -> None:
        with contextlib.suppress(OSError):
            os.write(self._answers, json.dumps(value).encode() + b"\n")


def _ended(descriptor: int) -> bool:
    """Whether a pipe has no writer any more."""
    poller = select.poll()
    poller.register(descriptor, 0)
    return bool(poller.poll(0))
