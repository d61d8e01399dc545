# SPDX-License-Identifier: MIT
"""What concerns the process as a whole."""

from blksnap_ublk.engine._engine import lib
from blksnap_ublk.engine.handle import check


def lock_memory() -> None:
    """mlockall: neither the present nor the future memory of this process is swapped out."""
    check(lib.bsu_lock_memory(), "mlockall")


def set_io_flusher() -> None:
    """PR_SET_IO_FLUSHER for the calling thread and those it starts later. OSError(EPERM) without CAP_SYS_RESOURCE."""
    check(lib.bsu_set_io_flusher(), "PR_SET_IO_FLUSHER")


def get_io_flusher() -> bool:
    """Whether the calling thread is an I/O flusher."""
    return bool(check(lib.bsu_get_io_flusher(), "PR_GET_IO_FLUSHER"))


def notify_fd() -> int:
    """An eventfd of this process: readable when an image was broken or a ublk queue changed its status."""
    return check(lib.bsu_notify_fd(), "eventfd")


def set_doorbell(fd: int) -> None:
    """Another eventfd that is told the same, which stays open; -1 for none."""
    lib.bsu_set_doorbell(fd)
