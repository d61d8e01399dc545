# SPDX-License-Identifier: MIT
"""The Python client: `connect()` gives a `Client`, whose methods are the commands, with the forms as their results."""

from blksnap_ublk.client.client import Client, connect
from blksnap_ublk.client.runtime import runtime_directory, socket_path

__all__ = ["Client", "connect", "runtime_directory", "socket_path"]
