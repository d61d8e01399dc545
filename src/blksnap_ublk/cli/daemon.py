# SPDX-License-Identifier: MIT
"""The commands serve and version."""

import os
import subprocess
import sys
from typing import Annotated

import msgspec
import typer

from blksnap_ublk.cli.command import PROGRAM, Json, Settings, client, command
from blksnap_ublk.cli.output import complain, say, say_json
from blksnap_ublk.client import Client, connect
from blksnap_ublk.errors import BlksnapError, Busy, UsageError, with_exit_code
from blksnap_ublk.forms import TakenOver, Version
from blksnap_ublk.version import installed_version


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(app, "serve", example="serve --foreground")(serve)
    command(app, "version", example="version")(version)


def serve(
    context: typer.Context,
    foreground: Annotated[bool, typer.Option("--foreground", help="Be the daemon; log to stderr.")] = False,
    hooks: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Run the programs in DIR/before.d and DIR/after.d around each snapshot; "
            "by default DIR is /etc/blksnap-ublk/hooks.",
        ),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the daemon; devices in use are kept for recovery.")] = False,
    takeover: Annotated[
        bool,
        typer.Option(
            "--takeover",
            help="Replace the daemon that runs by this version, while it is in use; "
            "whatever uses its devices waits for a moment.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Start the daemon, where it does not run already. Other commands do this by themselves."""
    settings: Settings = context.obj
    for name, option in (("--foreground", foreground), ("--takeover", takeover)):
        if option and stop:
            raise UsageError(f"{name} and --stop exclude one another")
    if json and not takeover:
        raise UsageError("--json needs --takeover")
    if hooks is not None and stop:
        raise UsageError("--hooks and --stop exclude one another")
    if hooks is not None and not os.path.isdir(hooks):
        raise UsageError("not a directory", subject=f"--hooks {hooks}")
    if foreground:
        options = ["--takeover"] if takeover else []
        os.execv(sys.executable, [*_daemon(hooks), "--foreground", *options])
    if takeover:
        pause = _take_over(hooks)
        say_json(pause) if json else say(f"replaced the daemon; what it serves waited for {pause.pause_ms} ms")
        return
    running = _running(settings.socket)
    if running is not None:
        with running:
            if stop:
                running.stop()
                return
            text = f"runs already, as process {running.daemon_version().pid}"
            if hooks is not None:
                raise Busy(text, advice="its hooks can be named at its start only: end it first, by `serve --stop`")
            complain(text, context.command_path)
    elif stop:
        complain("does not run", context.command_path)
    else:
        with client(context, hooks) as started:
            started.connect()


def _take_over(hooks: str | None) -> TakenOver:
    done = subprocess.run([*_daemon(hooks), "--takeover"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise with_exit_code(lines[-1].removeprefix("blksnap-ublkd: "), done.returncode)
    return msgspec.json.decode(done.stdout, type=TakenOver)


def _daemon(hooks: str | None) -> list[str]:
    options = [] if hooks is None else ["--hooks", os.path.abspath(hooks)]
    return [sys.executable, "-P", "-m", "blksnap_ublk.daemon.main", *options]


def version(context: typer.Context, json: Json = False) -> None:
    """Show the version of this program, and of the daemon where it runs."""
    settings: Settings = context.obj
    running = _running(settings.socket)
    daemon = None
    if running is not None:
        with running:
            daemon = running.daemon_version().version
    found = Version(version=installed_version(), daemon=daemon)
    if json:
        say_json(found)
        return
    say(f"{PROGRAM} {found.version}")
    if daemon is not None:
        say(f"daemon {daemon}")


def _running(socket: str | None) -> Client | None:
    """A client of the daemon if there is one that we may talk to."""
    try:
        return connect(socket, start=False)
    except BlksnapError:
        return None
