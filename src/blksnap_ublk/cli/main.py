# SPDX-License-Identifier: MIT
"""The command `blksnap-ublk`: its options, its commands, and what becomes of errors."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from blksnap_ublk.cli import changes, daemon, device, doctor, events, install, snapshot, status, storage
from blksnap_ublk.cli.command import PROGRAM, CommandFailed, ReaderGone, Settings
from blksnap_ublk.cli.output import complain
from blksnap_ublk.errors import one_line

INTERRUPTED = 130
BROKEN_PIPE = 141

app = typer.Typer(
    name=PROGRAM,
    help="Snapshots and change tracking for block devices, in user space, on ublk.",
    epilog=f"Example: {PROGRAM} attach /dev/sdb",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def settings(
    context: typer.Context,
    socket: Annotated[
        str | None, typer.Option(metavar="PATH", help="Socket of a daemon that runs already; none is started.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. Works anywhere.")] = False,
) -> None:
    """Snapshots and change tracking for block devices, in user space, on ublk."""
    context.obj = Settings(socket=socket)


device.add_to(app)
snapshot.add_to(app)
storage.add_to(app)
changes.add_to(app)
events.add_to(app)
status.add_to(app)
doctor.add_to(app)
install.add_to(app)
daemon.add_to(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name); the exit code."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [word for word in arguments[:end] if word != "--debug"] + list(arguments[end:])
    try:
        result = get_command(app).main(args=arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (ReaderGone, BrokenPipeError):
        _forget_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explain(error)


def main() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def _explain(error: Exception) -> int:
    """Say on stderr, in one line, what went wrong; the exit code."""
    if isinstance(error, CommandFailed):
        complain(error.error.message, error.command)
        return error.error.exit_code
    if isinstance(error, TyperException):
        context: typer.Context | None = getattr(error, "ctx", None)
        path = PROGRAM if context is None else context.command_path
        text = one_line(error.format_message()).rstrip(".")
        complain(f"{text[:1].lower()}{text[1:]}; see {path} --help", path)
        return 2
    complain(f"internal error: {type(error).__name__}: {error}; run it again with --debug", PROGRAM)
    return 1


def _forget_stdout() -> None:
    # Python writes out at its end what nobody wants to read any more.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    main()
