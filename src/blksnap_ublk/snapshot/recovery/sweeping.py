# SPDX-License-Identifier: MIT
"""The check of what was adopted, and the end of the quarantine of what dead io processes may still write to."""

from __future__ import annotations

import errno
import logging
import time
from contextlib import suppress

from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import buffers, releasing
from blksnap_ublk.snapshot.catalogue import SnapshotEntry
from blksnap_ublk.snapshot.context import Context

_log = logging.getLogger(__name__)


def begin(context: Context, snapshots: list[SnapshotEntry]) -> None:
    """Tells the io process that all that was left is adopted, or lost; where it refuses, `look` tells it again.

    Repeatable. Raises IoRefused, Failed.
    """
    context.quarantine = True
    inventory = context.io.inventory()
    context.sweeping = not inventory.swept
    context.untold = None
    if not context.sweeping:
        return
    there = {report.image for report in inventory.images}
    context.untold = sorted({image.serial for entry in snapshots for image in entry.images if image.key not in there})
    try:
        _tell(context, context.untold)
    except IoRefused as error:
        _log.error("what was left cannot be checked yet, which is tried again: %s", error)


def wait(context: Context, seconds: float) -> None:
    """For the end of the check, at most so many seconds. Raises Failed when the io process has gone."""
    end = time.monotonic() + seconds
    while context.sweeping:
        context.sweeping = not context.io.inventory().swept
        if not context.sweeping:
            buffers.remove_unused(context)
        elif time.monotonic() > end:
            return
        else:
            time.sleep(0.01)


def look(context: Context) -> None:
    """To be called again and again. Raises IoRefused, Failed, OSError."""
    if context.sweeping and context.untold is not None:
        with suppress(IoRefused):
            _tell(context, context.untold)
    wait(context, 0)
    if context.quarantine and releasing.late_writes_end(context, 0):
        context.io.call(messages.EndQuarantine())
        context.quarantine = False


def _tell(context: Context, lost: list[int]) -> None:
    try:
        buffers.tell_unstored(context)
        context.io.call(messages.Sweep(lost))
    except IoRefused as error:
        # Another control process has told it, and died.
        if error.errno != errno.EALREADY:
            raise
    context.untold = None
