# SPDX-License-Identifier: MIT
"""Memory that outlives a process, and the death of one between any two changes of it."""

from __future__ import annotations

import errno
import mmap
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blksnap_ublk.engine.sim import exit_at_change

_DIED, _UNCOUNTED = 100, 101


def shared(size: int) -> Any:
    """Array of `size` zeroed bytes; children of this process see the same ones."""
    return np.frombuffer(mmap.mmap(-1, (size + mmap.PAGESIZE - 1) & -mmap.PAGESIZE), dtype=np.uint8)[:size]


def _take(step: Callable[[], object], memory: Sequence[Any], number: int) -> int:
    try:
        exit_at_change([each.base for each in memory], number, _DIED)
    except OSError as error:
        return _UNCOUNTED if error.errno == errno.ENOTSUP else 1
    try:
        step()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def dies(step: Callable[[], object], memory: Sequence[Any], number: int) -> bool:
    """Another process takes the step, and dies when it is about to change `memory` for the `number`-th time, from 0.

    `memory`: arrays that are `shared`. False: it did not change it so often, and did not die. What only a process has
    is here as it was before. Raises NotImplementedError where changes cannot be counted.
    """
    pid = os.fork()
    if not pid:
        os._exit(_take(step, memory, number))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == _UNCOUNTED:
        raise NotImplementedError("changes of memory cannot be counted on this machine")
    assert status in (0, _DIED), f"the step ended with {status}"
    return status == _DIED
