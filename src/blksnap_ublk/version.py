# SPDX-License-Identifier: MIT
"""The version of the installed distribution."""

from functools import cache


@cache
def installed_version() -> str:
    """The version, such as `0.1.0`; `unknown` where the package runs without being installed.

    What it says at its first call is what runs, whatever is installed later.
    """
    from importlib import metadata

    try:
        return metadata.version("blksnap-ublk")
    except metadata.PackageNotFoundError:
        return "unknown"
