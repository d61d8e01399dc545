# SPDX-License-Identifier: MIT
"""Whether a file that is to hold difference storage is open anywhere else."""

from __future__ import annotations

import errno
import fcntl
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from blksnap_ublk.errors import Busy


@contextmanager
def only_here(descriptor: int, path: str) -> Iterator[None]:
    """Nobody else has the file open, and who opens it waits until the end of the `with`.

    Opened twice by this process counts as elsewhere. Where file systems or the host know no leases nothing is checked.
    Raises Busy, OSError.
    """
    # Who opens it meanwhile makes the kernel send a signal: one that does nothing, in place of SIGIO.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    held = True
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            advice = "end what has it open, or name another file"
            raise Busy("is open elsewhere", subject=path, errno="EBUSY", advice=advice) from None
        held = False
    try:
        yield
    finally:
        if held:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
