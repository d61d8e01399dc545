# SPDX-License-Identifier: MIT
"""What the keeper asks of the kernel for itself and its children: memory that stays, many descriptors."""

import ctypes
import logging
import os
import resource
from pathlib import Path

log = logging.getLogger(__name__)

DESCRIPTORS = 1 << 20

_MCL_CURRENT, _MCL_FUTURE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


def lock_memory() -> None:
    """Keep all memory of this process resident, or warn."""
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0:
        log.warning("memory cannot be locked (%s): under memory pressure devices may hang", _error_text())


def protect_from_oom() -> None:
    """Let the kernel kill everything else before this process and its children, or warn."""
    try:
        Path("/proc/self/oom_score_adj").write_text("-1000")
    except OSError as error:
        log.warning("no protection from the out-of-memory killer: %s", error)


def raise_limits() -> None:
    """Allow this process and its children many descriptors and unlimited locked memory, as far as the system does."""
    unlimited = resource.RLIM_INFINITY
    _raise_limit(resource.RLIMIT_MEMLOCK, unlimited)
    _raise_limit(resource.RLIMIT_NOFILE, min(DESCRIPTORS, _number("/proc/sys/fs/nr_open", DESCRIPTORS)))


def _raise_limit(kind: int, wanted: int) -> None:
    _, hard = resource.getrlimit(kind)
    try:
        resource.setrlimit(kind, (wanted, wanted))
    except (ValueError, OSError):
        resource.setrlimit(kind, (hard, hard))


def _number(path: str, otherwise: int) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return otherwise


def _error_text() -> str:
    return os.strerror(ctypes.get_errno())
