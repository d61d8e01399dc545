# SPDX-License-Identifier: MIT
"""The command events."""

from typing import Annotated

import typer

from blksnap_ublk.cli.command import Json, client, command
from blksnap_ublk.cli.output import say_json


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(app, "events", example="events --follow")(events)


def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with those to come.")] = False,
    since: Annotated[
        int | None,
        typer.Option(
            metavar="SEQ", min=0, help="Only those after this one; by default all that are kept, or with --follow none."
        ),
    ] = None,
    snapshot: Annotated[str | None, typer.Option(metavar="SNAPSHOT", help="Only those of this snapshot.")] = None,
    json: Json = False,
) -> None:
    """Show changes of state, one JSON object a line, with --json and without."""
    with client(context) as daemon:
        for event in daemon.events(since=since, follow=follow, snapshot=snapshot):
            say_json(event)
