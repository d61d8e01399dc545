# SPDX-License-Identifier: MIT
"""What every command has: its errors bear its name, and it reaches the daemon by the same settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from blksnap_ublk.cli.output import complain
from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError

PROGRAM = "blksnap-ublk"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

Reference = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="UUID, or its beginning (4 characters or more).")]


@dataclass(frozen=True)
class Settings:
    """The options that stand before the command."""

    socket: str | None


class CommandFailed(Exception):
    """An error, and the command (`blksnap-ublk snapshot create`) in which it occurred."""

    def __init__(self, command: str, error: BlksnapError) -> None:
        self.command = command
        self.error = error
        super().__init__(command, error)


class ReaderGone(Exception):
    """Nobody reads stdout any more."""


class Command(TyperCommand):
    """A command whose errors name it: BlksnapErrors become CommandFailed, complaints about values get its context."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BlksnapError as error:
            raise CommandFailed(ctx.command_path, error) from error
        except BrokenPipeError as error:
            raise ReaderGone from error
        except typer.BadParameter as error:
            error.ctx = error.ctx or ctx
            raise


def command(group: typer.Typer, name: str, *, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that adds a command to `group`. Its help ends in the example."""
    return group.command(name, cls=Command, epilog=f"Example: {PROGRAM} {example}")


def client(context: typer.Context, hooks: str | None = None) -> Client:
    """A client of the daemon, which is started at the first call if need be (with `hooks`); warnings go to stderr."""
    settings: Settings = context.obj
    path = context.command_path
    return Client(settings.socket, start=True, warn=lambda text: complain(f"warning: {text}", path), hooks=hooks)
