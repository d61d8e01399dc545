# SPDX-License-Identifier: MIT
"""Memory that outlives a process, and the death of one at the moment when it touches some of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def shared(size: int) -> Any:
    """Array of `size` zeroed bytes; children of this process see the same ones."""
    return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)


def dies_at_change(step: Callable[[], object], memory: Sequence[Any]) -> bool:
    """Another process takes the step and dies when it is about to change some of `memory`, which is `shared`.

    Whether it died: it does not where it changes none of it. What only a process has stays as it is here.
    """
    pid = os.fork()
    if not pid:
        try:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            for each in memory:
                _protect(each)
            step()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), "the step raised an error"
    return os.WIFSIGNALED(status)


def _protect(memory: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    size = (memory.nbytes + mmap.PAGESIZE - 1) & -mmap.PAGESIZE
    if libc.mprotect(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(size), mmap.PROT_READ):
        raise OSError(ctypes.get_errno(), "mprotect")
