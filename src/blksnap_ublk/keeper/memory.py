# SPDX-License-Identifier: MIT
"""What the keeper asks of the kernel for itself and its children: memory that stays, many descriptors."""

import ctypes
import logging
import os
import resource
from pathlib import Path

log = logging.getLogger(__name__)

DESCRIPTORS = 1 << 20

_MADV_POPULATE_READ = 22
_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def lock_memory() -> None:
    """Keep all memory of this process resident, or warn."""
    _lock(_MCL_CURRENT | _MCL_FUTURE)


def lock_present_memory() -> None:
    """Keep all files that this process has mapped by now resident, and of its memory what it touches, or warn.

    For processes with many threads, and libraries that reserve much more than they ever use.
    """
    if not _lock(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        return
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and fields[1].startswith("r"):
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            # A refusal leaves out what has no contents: a map that is longer than its file.
            _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_POPULATE_READ)


def _lock(flags: int) -> bool:
    if _libc.mlockall(flags) != 0:
        log.warning("memory cannot be locked (%s): under memory pressure devices may hang", _error_text())
        return False
    return True


def become_io_flusher() -> None:
    """Let this process and those that it starts not wait for devices of ours when the kernel frees memory, or warn."""
    if _libc.prctl(_PR_SET_IO_FLUSHER, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
        log.warning("PR_SET_IO_FLUSHER: %s: under memory pressure devices may hang", _error_text())


def protect_from_oom() -> None:
    """Let the kernel kill everything else before this process and its children, or warn."""
    try:
        Path("/proc/self/oom_score_adj").write_text("-1000")
    except OSError as error:
        log.warning("no protection from the out-of-memory killer: %s", error)


def raise_limits() -> None:
    """Allow this process and its children many descriptors and unlimited locked memory, as far as the system does; and
    no core dumps."""
    unlimited = resource.RLIM_INFINITY
    _raise_limit(resource.RLIMIT_MEMLOCK, unlimited)
    # A core file may have to wait for a device that waits for exactly this process. 1 also keeps the kernel from piping
    # it to a program, which 0 does not.
    _raise_limit(resource.RLIMIT_CORE, 1)
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
