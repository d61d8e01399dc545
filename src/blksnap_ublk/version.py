# SPDX-License-Identifier: MIT
"""The version of the installed distribution."""


def installed_version() -> str:
    """The version, such as `0.1.0`; `unknown` where the package runs without being installed."""
    from importlib import metadata

    try:
        return metadata.version("blksnap-ublk")
    except metadata.PackageNotFoundError:
        return "unknown"
