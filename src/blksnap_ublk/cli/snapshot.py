# SPDX-License-Identifier: MIT
"""The commands of the group `snapshot`."""

import re
from enum import StrEnum
from typing import Annotated

import typer

from blksnap_ublk.cli.command import Json, Reference, client, command
from blksnap_ublk.cli.output import fill_text, say, say_fields, say_json, say_table
from blksnap_ublk.cli.sizes import parse_size, parse_time, size_text
from blksnap_ublk.cli.storage import say_areas, storage_fields
from blksnap_ublk.errors import Untrusted, UsageError
from blksnap_ublk.forms import Destroyed, Freeze, Snapshot, SnapshotList

_ON_OVERFLOW = re.compile(r"break|pause:[0-9]+|evict-oldest")

Time = Annotated[
    float | None,
    typer.Option("--ttl", parser=parse_time, metavar="TIME", help="It ends by itself after 30s, 10m, 2h, 1d."),
]


class Print(StrEnum):
    """What `snapshot create` prints."""

    ID = "id"
    IMAGES = "images"


def add_to(app: typer.Typer) -> None:
    """Add the group to the program."""
    group = typer.Typer(
        help="Take, show and destroy snapshots.", epilog="Example: blksnap-ublk snapshot list", rich_markup_mode=None
    )
    app.add_typer(group, name="snapshot")
    command(group, "create", example="snapshot create /dev/sdb --storage /var/spool/diff --limit 20G")(create)
    command(group, "list", example="snapshot list")(list_snapshots)
    command(group, "show", example="snapshot show 1f0c --json")(show)
    command(group, "check", example="snapshot check 1f0c && echo trusted")(check)
    command(group, "renew", example="snapshot renew 1f0c --ttl 2h")(renew)
    command(group, "destroy", example="snapshot destroy 1f0c")(destroy)


def create(
    context: typer.Context,
    devices: Annotated[list[str], typer.Argument(metavar="DEVICE...", help="Origins or filtered devices.")],
    storage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Difference storage: a file, directory or block device, or PATH:START+COUNT,... (sectors); "
            "or @SNAPSHOT: share that of another snapshot.",
        ),
    ] = None,
    storage_file: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="The same for a path that holds colons: never split.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="How large the storage may grow.")
    ] = None,
    on_overflow: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="When the storage is full: break (the snapshot is lost at once; the default), pause:SECONDS (writers "
            "wait for room so long first), evict-oldest (older snapshots in it are destroyed first).",
        ),
    ] = None,
    wipe: Annotated[
        bool, typer.Option("--wipe", help="Overwrite what the storage held when it is given back.")
    ] = False,
    copy_rate: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="How many bytes a second copies may write to it, at least 1M."
        ),
    ] = None,
    no_freeze: Annotated[bool, typer.Option("--no-freeze", help="Do not freeze mounted file systems.")] = False,
    require_freeze: Annotated[
        bool, typer.Option("--require-freeze", help="Fail where a mounted file system cannot be frozen.")
    ] = False,
    partitions: Annotated[bool, typer.Option("--partitions", help="Show the partitions of the images.")] = False,
    ttl: Time = None,
    while_pid: Annotated[
        int | None, typer.Option(metavar="PID", help="It ends by itself when this process has ended.")
    ] = None,
    show: Annotated[
        Print, typer.Option("--print", help="What to print: the UUID, or the paths of the images.")
    ] = Print.ID,
    json: Json = False,
) -> None:
    """Take one snapshot of all the devices at one instant, and print its UUID."""
    if not storage and not storage_file:
        raise UsageError("no difference storage", advice="give --storage SPEC or --storage-file PATH")
    if no_freeze and require_freeze:
        raise UsageError("--no-freeze and --require-freeze exclude one another")
    if on_overflow is not None and _ON_OVERFLOW.fullmatch(on_overflow) is None:
        raise UsageError(f"--on-overflow {on_overflow}: not one of break, pause:SECONDS, evict-oldest")
    freeze = Freeze.NO if no_freeze else Freeze.REQUIRE if require_freeze else Freeze.TRY
    with client(context) as daemon:
        snapshot = daemon.create_snapshot(
            devices,
            storage=storage or [],
            storage_files=storage_file or [],
            limit=limit,
            on_overflow=on_overflow,
            freeze=freeze,
            partitions=partitions,
            ttl=ttl,
            while_pid=while_pid,
            wipe=wipe,
            copy_rate=copy_rate,
        )
    if json:
        say_json(snapshot)
    elif show is Print.IMAGES:
        for image in snapshot.images:
            say(image.image)
    else:
        say(snapshot.id)


def list_snapshots(context: typer.Context, json: Json = False) -> None:
    """Show the held snapshots."""
    with client(context) as daemon:
        snapshots = daemon.list_snapshots()
    if json:
        say_json(SnapshotList(snapshots=snapshots))
        return
    say_table(
        ["SNAPSHOT", "CREATED", "STATE", "ENDS", "DEVICES", "STORAGE"],
        [
            (
                s.id,
                s.created,
                s.state if s.lost_at is None else f"{s.state} since {s.lost_at}",
                _end_text(s),
                ",".join(i.device for i in s.images),
                fill_text(s.storage.used, s.storage.capacity),
            )
            for s in snapshots
        ],
    )


def show(context: typer.Context, snapshot: Reference, json: Json = False) -> None:
    """Show one snapshot: its state, images and storage."""
    with client(context) as daemon:
        found = daemon.show_snapshot(snapshot)
    if json:
        say_json(found)
    else:
        _say_snapshot(found)


def check(context: typer.Context, snapshot: Reference, json: Json = False) -> None:
    """Tell whether a snapshot can be trusted: exit code 0, otherwise 6."""
    with client(context) as daemon:
        checked = daemon.check_snapshot(snapshot)
    if json:
        say_json(checked)
    if not checked.trusted:
        raise Untrusted(f"snapshot {checked.id} cannot be trusted: {checked.reason}", advice="destroy it")


def renew(context: typer.Context, snapshot: Reference, ttl: Time = None, json: Json = False) -> None:
    """Let a snapshot with a time to live last that long from now on, or for another TIME."""
    with client(context) as daemon:
        renewed = daemon.renew_snapshot(snapshot, ttl=ttl)
    if json:
        say_json(renewed)


def destroy(
    context: typer.Context,
    snapshots: Annotated[list[str], typer.Argument(metavar="SNAPSHOT...", help="UUIDs, or their beginnings.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also while an image is open: its readers get errors.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove snapshots and give their storage back."""
    with client(context) as daemon:
        destroyed = daemon.destroy_snapshots(snapshots, force=force)
    if json:
        say_json(Destroyed(destroyed=destroyed, warnings=[]))


def _say_snapshot(snapshot: Snapshot) -> None:
    storage = snapshot.storage
    say_fields(
        [
            ("snapshot", snapshot.id),
            ("created", snapshot.created),
            ("state", snapshot.state if snapshot.error is None else f"{snapshot.state}: {snapshot.error}"),
            *([] if snapshot.lost_at is None else [("lost at", snapshot.lost_at)]),
            ("ends", _end_text(snapshot)),
            ("frozen", "yes" if snapshot.frozen else "no"),
            (
                "gate closed",
                f"{snapshot.gate_us} µs ({snapshot.gate_writes_us} µs for writes in flight)",
            ),
            *storage_fields(storage),
            ("shared with", ", ".join(other for other in storage.snapshots if other != snapshot.id) or "-"),
        ]
    )
    say("")
    say_table(
        ["IMAGE", "LINK", "DEVICE", "ORIGIN", "STATE", "PRESERVED", "CURSOR"],
        [
            (i.image, i.link or "-", i.device, i.origin, i.state, size_text(i.preserved_bytes), i.cursor)
            for i in snapshot.images
        ],
    )
    say("")
    say_areas(storage)


def _end_text(snapshot: Snapshot) -> str:
    """What ends it by itself: `-`, a time, `with 4711` for a process, or both."""
    process = None if snapshot.while_pid is None else f"with {snapshot.while_pid}"
    return " or ".join(filter(None, [snapshot.expires, process])) or "-"
