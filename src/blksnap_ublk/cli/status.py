# SPDX-License-Identifier: MIT
"""The command status."""

import sys
from typing import Annotated

import typer

from blksnap_ublk.cli.command import Json, client, command
from blksnap_ublk.cli.output import fill_text, say, say_json, say_table
from blksnap_ublk.cli.sizes import duration_text, size_text
from blksnap_ublk.forms import DeviceStatus, Snapshot, Status

CLEAR = "\x1b[H\x1b[J"


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(app, "status", example="status --follow")(status)


def status(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", help="Go on, once a second.")] = False,
    json: Json = False,
) -> None:
    """Show devices, snapshots, rates, fill level and forecast."""
    with client(context) as daemon:
        for found in daemon.follow_status() if follow else [daemon.status()]:
            if json:
                say_json(found)
            else:
                _say_status(found, clear=follow and sys.stdout.isatty())


def _say_status(found: Status, *, clear: bool) -> None:
    if clear:
        say(CLEAR)
    say_table(
        ["DEVICE", "NAME", "STATE", "READS/S", "WRITES/S", "READ/S", "WRITTEN/S", "PRESERVED/S"],
        [_rates(device) for device in found.devices],
    )
    say("")
    say_table(
        ["SNAPSHOT", "STATE", "STORAGE", "GROWS", "FULL IN", "WAITING"],
        [_snapshot(snapshot) for snapshot in found.snapshots],
    )


def _snapshot(snapshot: Snapshot) -> tuple[str | int, ...]:
    storage = snapshot.storage
    limit = "" if storage.limit is None else f"to {size_text(storage.limit)}"
    return (
        snapshot.id,
        snapshot.state,
        fill_text(storage.used, storage.capacity),
        limit or "yes" if storage.growing else "no",
        duration_text(storage.forecast_seconds),
        storage.waiting,
    )


def _rates(status: DeviceStatus) -> tuple[str | int, ...]:
    device, rates = status.device, status.rates
    if rates is None:
        return (device.device, device.name, device.state, "-", "-", "-", "-", "-")
    return (
        device.device,
        device.name,
        device.state,
        round(rates.reads),
        round(rates.writes),
        size_text(rates.read_bytes),
        size_text(rates.written_bytes),
        size_text(rates.preserved_bytes),
    )
