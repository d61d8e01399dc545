# SPDX-License-Identifier: MIT
"""Map memory of the io process: given in portions ahead of need, because it cannot wait for any when it needs it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from blksnap_ublk.errors import Failed
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.state_files import PORTION_BYTES

AHEAD = 2 * PORTION_BYTES
"""Bytes that are free whenever a snapshot is held, as long as the state directory has room."""

_RESERVED_SHARE = 8  # one part in so many of the state directory is left to bitmaps and records
_PREFIX = "map-"
_giving = threading.RLock()


def ensure(context: Context, *, at_least_one: bool = False, needed: int = 0) -> bool:
    """Gives the io process map memory until `AHEAD` bytes are free; False when the state directory has no room for it.

    With `at_least_one` a lack is an error as long as there is no portion at all. `needed`: bytes that are used at once,
    and whose lack is an error too. Raises Failed, IoRefused, OSError.
    """
    with _giving:
        inventory = context.io.inventory()
        missing = -(-(AHEAD + needed - inventory.map_memory_free) // PORTION_BYTES)
        for _ in range(max(missing, 0)):
            if not _room(context):
                if at_least_one and inventory.map_memory_free < PORTION_BYTES // 4 + needed:
                    text = f"no room for map memory ({PORTION_BYTES} bytes) in {context.state.directory}"
                    advice = "destroy snapshots, or restart the daemon with more --state-size"
                    raise Failed(text, errno="ENOSPC", advice=advice)
                return False
            _give(context, inventory.portions)
            inventory = context.io.inventory()
    return True


@contextmanager
def halted() -> Iterator[None]:
    """While none is given, but by this thread: the portions of a dead io process have to come first."""
    with _giving:
        yield


def numbers(context: Context) -> list[int]:
    """The numbers of the portions in the state directory, in order."""
    names = (name.removeprefix(_PREFIX) for name in context.state.names() if name.startswith(_PREFIX))
    return sorted(int(number) for number in names if number.isdecimal())


def name_of(number: int) -> str:
    """The state file of a portion."""
    return f"{_PREFIX}{number}"


def remove_unused(context: Context) -> None:
    """Removes the files of portions that the io process does not have. Raises IoRefused, Failed, OSError."""
    with _giving:
        used = set(context.io.inventory().portions)
        for number in numbers(context):
            if name_of(number) not in used:
                context.state.remove(name_of(number))


def _give(context: Context, given: list[str]) -> None:
    name = next(name for n in range(len(given) + 1) if (name := name_of(n)) not in given)
    descriptor = context.state.create(name, PORTION_BYTES)
    try:
        context.io.call(messages.AddMapMemory([name]), [descriptor])
    except IoRefused:
        # Without an answer it may have taken it.
        context.state.remove(name)
        raise
    finally:
        os.close(descriptor)


def _room(context: Context) -> bool:
    space = os.statvfs(context.state.directory)
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    return free >= PORTION_BYTES + total // _RESERVED_SHARE
