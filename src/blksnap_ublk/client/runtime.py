# SPDX-License-Identifier: MIT
"""Where the daemon is reached."""

import os

from blksnap_ublk.calls import INTERFACE

RUNTIME_VARIABLE = "BLKSNAP_UBLK_RUN"
DEFAULT_RUNTIME = "/run/blksnap-ublk"


def runtime_directory() -> str:
    """The runtime directory: that of the environment variable BLKSNAP_UBLK_RUN, or /run/blksnap-ublk."""
    return os.path.abspath(os.environ.get(RUNTIME_VARIABLE) or DEFAULT_RUNTIME)


def socket_path() -> str:
    """The daemon's varlink socket in the runtime directory."""
    return os.path.join(runtime_directory(), INTERFACE)
