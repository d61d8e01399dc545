# SPDX-License-Identifier: MIT
"""The commands attach, detach, resize and list."""

from typing import Annotated

import typer

from blksnap_ublk.cli.command import Json, client, command
from blksnap_ublk.cli.output import complain, say, say_json, say_table
from blksnap_ublk.cli.sizes import parse_size, size_text
from blksnap_ublk.forms import DeviceList


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(app, "attach", example="attach /dev/sdb --name data")(attach)
    command(app, "detach", example="detach /dev/sdb")(detach)
    command(app, "resize", example="resize /dev/sdb")(resize)
    command(app, "list", example="list --json")(list_devices)


def attach(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="Path of the origin.")],
    name: Annotated[str | None, typer.Option(help="A name for it; by default that of the origin.")] = None,
    queues: Annotated[int | None, typer.Option(min=1, help="Number of queues.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Requests that each queue holds.")] = None,
    tracking_block: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="Granule of change tracking: 4K to 64M, 64K.")
    ] = None,
    unit: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="Granule of copy-on-write, by default 4K.")
    ] = None,
    trust_offline: Annotated[
        bool, typer.Option("--trust-offline", help="Nobody wrote to it since its detach: go on with that change map.")
    ] = False,
    json: Json = False,
) -> None:
    """Serve the filtered device of an origin, and print its path."""
    with client(context) as daemon:
        attached = daemon.attach(
            device,
            name=name,
            queues=queues,
            depth=depth,
            tracking_block=tracking_block,
            unit=unit,
            trust_offline=trust_offline,
        )
    if json:
        say_json(attached)
    else:
        say(attached.device)


def detach(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="Path of the origin or of the filtered device, or its name.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also while in use: breaks its snapshots, its users get errors.")
    ] = False,
    json: Json = False,
) -> None:
    """Write back the dirty cache and stop serving a filtered device."""
    with client(context) as daemon:
        detached = daemon.detach(device, force=force)
    if json:
        say_json(detached)


def resize(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="Path of the origin or of the filtered device, or its name.")],
    json: Json = False,
) -> None:
    """Follow an origin that has grown. Snapshots that are held keep their size."""
    with client(context) as daemon:
        resized = daemon.resize(device)
    if json:
        say_json(resized)
    size = resized.device.size
    if size == resized.former_size:
        complain(f"{resized.device.device} has {size} bytes already, as its origin", context.command_path)
    else:
        complain(f"{resized.device.device} has {size} bytes now, {resized.former_size} before", context.command_path)


def list_devices(context: typer.Context, json: Json = False) -> None:
    """Show the filtered devices."""
    with client(context) as daemon:
        devices = daemon.list_devices()
    if json:
        say_json(DeviceList(devices=devices))
        return
    say_table(
        ["DEVICE", "NAME", "ORIGIN", "SIZE", "STATE", "DATA", "CHANGE", "SNAPSHOTS"],
        [
            (d.device, d.name, d.origin, size_text(d.size), d.state, d.data_path, d.change_number, len(d.snapshots))
            for d in devices
        ],
    )
