# SPDX-License-Identifier: MIT
"""The commands install and uninstall: they work on files, without the daemon."""

from pathlib import Path
from typing import Annotated

import typer

from blksnap_ublk.cli.command import command
from blksnap_ublk.cli.output import complain, say
from blksnap_ublk.install import Installable
from blksnap_ublk.install import install as install_it
from blksnap_ublk.install import uninstall as uninstall_it
from blksnap_ublk.keeper.runtime import RuntimePaths

What = Annotated[
    Installable,
    typer.Argument(
        help="udev: rules for our devices; lvm: a filter, in lvmlocal.conf; "
        "systemd: units that run the daemon, end it last at a shutdown, and attach devices at boot."
    ),
]
Root = Annotated[Path, typer.Option(metavar="DIR", help="The root of the system to change.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(app, "install", example="install udev")(install)
    command(app, "uninstall", example="uninstall udev")(uninstall)


def install(what: What, root: Root = Path("/")) -> None:
    """Tell another part of the system about our devices, and print the files that do."""
    for path in install_it(what, root, RuntimePaths.from_environment().root):
        say(str(path))


def uninstall(context: typer.Context, what: What, root: Root = Path("/")) -> None:
    """Take away what install has put there, and print the files that had it."""
    paths = uninstall_it(what, root, RuntimePaths.from_environment().root)
    if not paths:
        complain("nothing was installed", context.command_path)
    for path in paths:
        say(str(path))
