# SPDX-License-Identifier: MIT
"""The clean end of the daemon: what nobody uses is removed, what is in use is kept for recovery."""

from __future__ import annotations

import logging

from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import destroy, detach, naming
from blksnap_ublk.snapshot.context import Context

_log = logging.getLogger(__name__)


def end(context: Context) -> bool:
    """Removes idle snapshots and devices and ends the io process. True when nothing is left.

    What is kept is named in the log: its users wait until a daemon runs again.
    """
    for snapshot in naming.held_snapshots(context.catalogue):
        try:
            for warning in destroy.destroy(context, snapshot, force=False):
                _log.warning("%s", warning)
        except (BlksnapError, OSError) as error:
            _log.warning("snapshot %s is lost: its image is kept until its users are gone: %s", snapshot.id, error)
    for device in naming.served_devices(context.catalogue):
        try:
            _, warnings = detach.detach(context, device, force=False)
            for warning in warnings:
                _log.warning("%s", warning)
        except (BlksnapError, OSError) as error:
            path = naming.block_path(device)
            _log.warning("%s is kept for recovery, its users wait for the next daemon: %s", path, error)
    left = bool(context.catalogue.devices() or context.catalogue.snapshots())
    try:
        context.io.call(messages.Shutdown())
    except (BlksnapError, IoRefused) as error:
        _log.warning("the io process: %s", error)
    if not left:
        for name in context.state.names():
            if not name.startswith("ring-lock."):
                context.state.remove(name)
    return not left
