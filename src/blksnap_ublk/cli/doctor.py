# SPDX-License-Identifier: MIT
"""The command doctor."""

import typer

from blksnap_ublk.cli.command import Json, client, command
from blksnap_ublk.cli.output import say, say_json
from blksnap_ublk.forms import Findings


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(app, "doctor", example="doctor")(doctor)


def doctor(context: typer.Context, json: Json = False) -> None:
    """Show what is fit or unfit about this system, and what to do about it."""
    with client(context) as daemon:
        findings = daemon.doctor()
    if json:
        say_json(Findings(findings=findings))
        return
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        say(f"{finding.state:<4}  {finding.name:<{width}}  {finding.text}")
        if finding.advice is not None:
            say(f"{'':<4}  {'':<{width}}  -> {finding.advice}")
