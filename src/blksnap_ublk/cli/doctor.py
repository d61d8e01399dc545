# SPDX-License-Identifier: MIT
"""The command doctor."""

from collections.abc import Sequence
from typing import Annotated

import typer

from blksnap_ublk.cli.command import Json, client, command
from blksnap_ublk.cli.output import complain, say, say_json
from blksnap_ublk.forms import Finding, Findings, Repaired


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(app, "doctor", example="doctor")(doctor)


def doctor(
    context: typer.Context,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Put right what needs no decision: udev rules, LVM's filter, left-overs."),
    ] = False,
    json: Json = False,
) -> None:
    """Show what is fit or unfit about this system, and what to do about it."""
    with client(context) as daemon:
        form = daemon.repair() if fix else Findings(findings=daemon.doctor())
    if json:
        say_json(form)
        return
    if isinstance(form, Repaired):
        for line in form.fixed:
            complain(line, context.command_path)
    _say_findings(form.findings)


def _say_findings(findings: Sequence[Finding]) -> None:
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        say(f"{finding.state:<4}  {finding.name:<{width}}  {finding.text}")
        if finding.advice is not None:
            say(f"{'':<4}  {'':<{width}}  -> {finding.advice}")
