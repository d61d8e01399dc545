# SPDX-License-Identifier: MIT
"""What is put into other parts of the system, on demand: udev rules, a filter for LVM."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from blksnap_ublk.errors import Failed, from_os_error
from blksnap_ublk.install import lvm_filter, udev_rules


class Installable(StrEnum):
    """What can be installed."""

    UDEV = "udev"
    LVM = "lvm"


def install(kind: Installable, root: Path = Path("/"), runtime: Path = Path(udev_rules.DEFAULT_RUNTIME)) -> Path:
    """Installs it below `root`, for a daemon with that runtime directory; the file that has it now. Raises Failed."""
    try:
        return udev_rules.install_rules(root, runtime) if kind is Installable.UDEV else lvm_filter.install_filter(root)
    except ValueError as error:
        raise Failed(str(error)) from None
    except OSError as error:
        raise from_os_error(error, subject=str(root) if error.filename is None else None) from None


def uninstall(kind: Installable, root: Path = Path("/")) -> Path | None:
    """Takes it away; the file that had it, None where there was none. Raises Failed."""
    try:
        return udev_rules.uninstall_rules(root) if kind is Installable.UDEV else lvm_filter.uninstall_filter(root)
    except OSError as error:
        raise from_os_error(error, subject=str(root) if error.filename is None else None) from None
