# SPDX-License-Identifier: MIT
"""What is put into other parts of the system, on demand: udev rules, a filter for LVM, units of systemd."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from blksnap_ublk.errors import Failed, from_os_error
from blksnap_ublk.install import lvm_filter, systemd_units, udev_rules


class Installable(StrEnum):
    """What can be installed."""

    UDEV = "udev"
    LVM = "lvm"
    SYSTEMD = "systemd"


def install(kind: Installable, root: Path = Path("/"), runtime: Path = Path(udev_rules.DEFAULT_RUNTIME)) -> list[Path]:
    """Installs it below `root`, for a daemon with that runtime directory; the files that have it now. Raises Failed."""
    try:
        match kind:
            case Installable.UDEV:
                return [udev_rules.install_rules(root, runtime)]
            case Installable.LVM:
                return [lvm_filter.install_filter(root)]
            case Installable.SYSTEMD:
                return systemd_units.install_units(root, runtime)
    except ValueError as error:
        raise Failed(str(error)) from None
    except OSError as error:
        raise from_os_error(error, subject=str(root) if error.filename is None else None) from None


def uninstall(
    kind: Installable, root: Path = Path("/"), runtime: Path = Path(udev_rules.DEFAULT_RUNTIME)
) -> list[Path]:
    """Takes it away; the files that had it, none where there were none. Raises Failed."""
    try:
        match kind:
            case Installable.UDEV:
                path = udev_rules.uninstall_rules(root)
            case Installable.LVM:
                path = lvm_filter.uninstall_filter(root)
            case Installable.SYSTEMD:
                return systemd_units.uninstall_units(root, runtime)
    except OSError as error:
        raise from_os_error(error, subject=str(root) if error.filename is None else None) from None
    return [] if path is None else [path]
