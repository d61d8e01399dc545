# SPDX-License-Identifier: MIT
"""The commands of the group `storage`."""

from typing import Annotated

import typer

from blksnap_ublk.cli.command import Json, Reference, client, command
from blksnap_ublk.cli.output import fill_text, say, say_fields, say_json, say_table
from blksnap_ublk.cli.sizes import duration_text, parse_size, size_text
from blksnap_ublk.errors import UsageError
from blksnap_ublk.forms import Storage

SECTOR = 512
NO_RATE = "none"


def add_to(app: typer.Typer) -> None:
    """Add the group to the program."""
    group = typer.Typer(
        help="Show and change the difference storage of a snapshot.",
        epilog="Example: blksnap-ublk storage show 1f0c",
        rich_markup_mode=None,
    )
    app.add_typer(group, name="storage")
    command(group, "show", example="storage show 1f0c")(show)
    command(group, "add", example="storage add 1f0c /dev/sdd:2048+41943040 /mnt/spare")(add)
    command(group, "limit", example="storage limit 1f0c 40G")(limit)
    command(group, "rate", example="storage rate 1f0c 50M")(rate)


def show(context: typer.Context, snapshot: Reference, json: Json = False) -> None:
    """Show the difference storage of a snapshot."""
    with client(context) as daemon:
        _say(daemon.show_storage(snapshot), json=json)


def add(
    context: typer.Context,
    snapshot: Reference,
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SPEC", help="Files, directories or block devices, or PATH:START+COUNT,... (sectors)."),
    ] = None,
    storage_file: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="The same for a path that holds colons: never split.")
    ] = None,
    json: Json = False,
) -> None:
    """Make the difference storage of a snapshot larger now."""
    if not specs and not storage_file:
        raise UsageError("no difference storage is named", advice="give SPECs or --storage-file PATH")
    with client(context) as daemon:
        _say(daemon.add_storage(snapshot, specs or [], storage_files=storage_file or []), json=json)


def limit(
    context: typer.Context,
    snapshot: Reference,
    size: Annotated[int, typer.Argument(parser=parse_size, metavar="SIZE", help="How large it may grow by itself.")],
    json: Json = False,
) -> None:
    """Change how large the difference storage may grow by itself."""
    with client(context) as daemon:
        _say(daemon.limit_storage(snapshot, size), json=json)


def rate(
    context: typer.Context,
    snapshot: Reference,
    size: Annotated[
        str, typer.Argument(metavar="SIZE|none", help="Bytes a second, at least 1M; none: as fast as it is.")
    ],
    json: Json = False,
) -> None:
    """Change how fast copy-on-write may write to the difference storage."""
    copy_rate = None if size == NO_RATE else parse_size(size)
    with client(context) as daemon:
        _say(daemon.throttle_storage(snapshot, copy_rate), json=json)


def storage_fields(storage: Storage) -> list[tuple[str, str | int]]:
    """What a table says of it, apart from its areas."""
    waiting = f"; {storage.waiting} requests wait for room" if storage.waiting else ""
    return [
        ("storage", fill_text(storage.used, storage.capacity) + waiting),
        ("grows", "by itself" if storage.growing else "no"),
        ("limit", "-" if storage.limit is None else size_text(storage.limit)),
        ("on overflow", storage.on_overflow),
        ("full in", duration_text(storage.forecast_seconds)),
        ("copy rate", "-" if storage.copy_rate is None else f"{size_text(storage.copy_rate)} a second"),
        ("wiped", "when given back" if storage.wipe else "no"),
    ]


def say_areas(storage: Storage) -> None:
    """A table of its areas."""
    say_table(
        ["STORAGE AREA", "START", "SECTORS", "USED"],
        [(a.path, a.start, a.count, fill_text(a.used, a.count * SECTOR)) for a in storage.areas],
    )


def _say(storage: Storage, *, json: bool) -> None:
    if json:
        say_json(storage)
        return
    say_fields([*storage_fields(storage), ("snapshots", ", ".join(storage.snapshots) or "-")])
    say("")
    say_areas(storage)
