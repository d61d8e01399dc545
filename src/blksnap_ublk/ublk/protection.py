# SPDX-License-Identifier: MIT
"""Keeping the memory of a server from waiting for its own device."""

from __future__ import annotations

import logging

from blksnap_ublk import engine

log = logging.getLogger(__name__)


def protect_process(*, io_flusher: bool = True, lock_memory: bool = True) -> bool:
    """Sets PR_SET_IO_FLUSHER for the calling thread and those it starts from then on, and locks all memory.

    Without the first, memory reclaim in the server may wait for a write to its own device; without the second, a page
    of the server may lie in a swap area on it. A refusal is logged as a warning, with what follows from it. Returns
    whether threads can be I/O flushers.
    """
    flusher = io_flusher
    if io_flusher:
        try:
            engine.set_io_flusher()
        except OSError as error:
            flusher = False
            log.warning("PR_SET_IO_FLUSHER: %s: under memory pressure the device may stand still", error.strerror)
    if lock_memory:
        try:
            engine.lock_memory()
        except OSError as error:
            log.warning("mlockall: %s: the device must not be used for swap (see ulimit -l)", error.strerror)
    return flusher
