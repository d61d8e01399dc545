# SPDX-License-Identifier: MIT
"""The end of control and io for another version of the daemon, which takes over what they serve."""

from __future__ import annotations

import logging

from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import naming
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.ublk.control import Control

_QUIESCE_LIMIT = 1.0  # seconds for the requests of a device that are under way to end

_log = logging.getLogger(__name__)


def leave(context: Context) -> None:
    """Ends the io process; all devices, snapshots and state files stay as they are, their users wait.

    Where the kernel can do that the requests under way end before. Otherwise they are sent again to the next io
    process, as after a death.
    """
    with Control() as control:
        for device in naming.served_devices(context.catalogue):
            try:
                if device.served is not None:
                    control.quiesce(device.served.ublk_id, timeout=_QUIESCE_LIMIT)
            except OSError as error:
                _log.info("%s is not quiesced: %s", device.origin, error.strerror)
    try:
        context.io.call(messages.Shutdown())
    except (BlksnapError, IoRefused) as error:
        _log.warning("the io process: %s", error)
