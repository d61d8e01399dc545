# SPDX-License-Identifier: MIT
"""The commands of the group `changes`."""

import re
from typing import Annotated

import msgspec
import typer

from blksnap_ublk.cli.command import Json, client, command
from blksnap_ublk.cli.output import complain, say_fields, say_json, say_table
from blksnap_ublk.cli.sizes import parse_range, size_text
from blksnap_ublk.errors import Failed, UsageError
from blksnap_ublk.forms import Changes, ChangesInfo, Range

_CURSOR = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}:[0-9]+")

Device = Annotated[str, typer.Argument(help="Path of the origin or of the filtered device, or its name.")]


def add_to(app: typer.Typer) -> None:
    """Add the group to the program."""
    group = typer.Typer(
        help="What changed since an earlier snapshot.",
        epilog="Example: blksnap-ublk changes info /dev/sdb",
        rich_markup_mode=None,
    )
    app.add_typer(group, name="changes")
    command(group, "show", example="changes show /dev/sdb --since none --json")(show)
    command(group, "info", example="changes info /dev/sdb")(info)
    command(group, "mark", example="changes mark /dev/sdb --range 1M+64K")(mark)
    command(group, "dump", example="changes dump /dev/sdb last_change.npy")(dump)


def show(
    context: typer.Context,
    device: Device,
    since: Annotated[
        str, typer.Option(metavar="CURSOR|none", help="Cursor of an earlier image; none: since tracking began.")
    ],
    until: Annotated[
        str | None, typer.Option(metavar="SNAPSHOT", help="A held snapshot; by default the last one taken.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what changed between a cursor and a snapshot, in bytes."""
    cursor = None if since == "none" else _cursor(since)
    with client(context) as daemon:
        changes = _whole(list(daemon.changes_in_portions(device, since=cursor, until=until)))
    if json:
        say_json(changes)
        return
    if changes.all:
        complain(f"warning: everything counts as changed: {changes.reason}", context.command_path)
    say_table(["START", "LENGTH"], [(r.start, r.length) for r in changes.ranges])


def info(context: typer.Context, device: Device, json: Json = False) -> None:
    """Show the state of change tracking."""
    with client(context) as daemon:
        found = daemon.describe_changes(device)
    if json:
        say_json(found)
    else:
        _say_info(found)


def mark(
    context: typer.Context,
    device: Device,
    ranges: Annotated[
        list[str] | None, typer.Option("--range", metavar="START+LENGTH", help="Bytes of the device, as 1M+64K.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="PATH", help="A file of a file system on the filtered device.")
    ] = None,
    json: Json = False,
) -> None:
    """Force blocks into the next increment."""
    if bool(ranges) == (file is not None):
        raise UsageError("give either --range START+LENGTH, once or more, or --file PATH")
    wanted = [Range(start=start, length=length) for start, length in map(parse_range, ranges or [])]
    with client(context) as daemon:
        marked = daemon.mark_changes(device, wanted) if file is None else daemon.mark_file(device, file)
    if json:
        say_json(marked)


def dump(
    context: typer.Context,
    device: Device,
    file: Annotated[str, typer.Argument(metavar="FILE.npy", help="Where to write it.")],
    json: Json = False,
) -> None:
    """Write the array of last changes, one number for each tracking block, to a file for numpy."""
    with client(context) as daemon:
        daemon.dump_changes(device, file)
        if json:
            say_json(daemon.describe_changes(device))


def _cursor(text: str) -> str:
    if text.isdigit():
        raise UsageError(
            f"--since {text}: a bare number would be silently wrong after the history was lost",
            advice="give the whole cursor, GENERATION:NUMBER, or none",
        )
    if _CURSOR.fullmatch(text) is None:
        raise UsageError(f"--since {text}: not a cursor", advice="give GENERATION:NUMBER, or none")
    return text


def _whole(portions: list[Changes]) -> Changes:
    if not portions:
        raise Failed("the daemon gave no answer")
    return msgspec.structs.replace(portions[0], ranges=[found for portion in portions for found in portion.ranges])


def _say_info(found: ChangesInfo) -> None:
    say_fields(
        [
            ("device", found.device),
            ("generation", found.generation),
            ("change number", found.change_number),
            ("tracking block", size_text(found.tracking_block)),
            ("blocks", found.blocks),
            ("changed blocks", found.changed_blocks),
        ]
    )
