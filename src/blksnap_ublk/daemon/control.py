# SPDX-License-Identifier: MIT
"""The control process: `python -m blksnap_ublk.daemon.control`, a child of the keeper.

It decides, the io process serves. Killed at any moment it is started again, reads the catalogue, and goes on; nobody
who uses a filtered device or an image notices.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from blksnap_ublk.daemon.commands import Commands
from blksnap_ublk.daemon.ending import end
from blksnap_ublk.daemon.events import EventLog
from blksnap_ublk.daemon.forecast import Forecasts
from blksnap_ublk.daemon.interface import ublk_interface
from blksnap_ublk.daemon.watch import Watch
from blksnap_ublk.errors import BlksnapError, Unsupported, from_os_error
from blksnap_ublk.keeper.child import EXIT_DEVICES_LEFT, EXIT_NOTHING_LEFT, ChildStart
from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.log import start_log
from blksnap_ublk.keeper.runtime import RuntimePaths
from blksnap_ublk.snapshot.catalogue import Catalogue
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.disks import Disks
from blksnap_ublk.snapshot.filling import Filling
from blksnap_ublk.snapshot.io_link import IoLink
from blksnap_ublk.snapshot.reconcile import reconcile
from blksnap_ublk.snapshot.state_files import StateFiles
from blksnap_ublk.snapshot.storage import DescriptorRegistry
from blksnap_ublk.ublk.control import Control
from blksnap_ublk.varlink.introspection import Info
from blksnap_ublk.varlink.server import Server
from blksnap_ublk.version import installed_version

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM; the exit status tells the keeper whether devices are left."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hooks", type=Path)
    own, rest = parser.parse_known_args(arguments)
    start = ChildStart.from_arguments(rest)
    start_log("control")
    with ExitStack() as stack:
        try:
            events = EventLog(start.paths.state / "events")
            context = _context(start.paths, own.hooks, events, stack)
            reconcile(context)
        except BlksnapError as error:
            start.failed(error.message, error.exit_code)
            return error.exit_code
        except OSError as error:
            failure = from_os_error(error)
            start.failed(failure.message, failure.exit_code)
            return failure.exit_code
        asyncio.run(_serve(start, context, events))
        return EXIT_NOTHING_LEFT if end(context) else EXIT_DEVICES_LEFT


def _context(paths: RuntimePaths, hooks: Path | None, events: EventLog, stack: ExitStack) -> Context:
    try:
        control = stack.enter_context(Control())
    except OSError as error:
        raise Unsupported(error.strerror or str(error), subject=error.filename) from None
    keeper = stack.enter_context(KeeperClient(paths.keeper_socket))
    io = IoLink(paths.io_socket)
    stack.callback(io.close)
    return Context(
        io=io,
        keeper=keeper,
        disks=Disks(control, paths.root),
        state=StateFiles(paths.state),
        catalogue=Catalogue(paths.state / "catalogue"),
        registry=DescriptorRegistry(),
        emit=events.emit,
        hooks=hooks,
    )


async def _serve(start: ChildStart, context: Context, events: EventLog) -> None:
    """Answers calls until SIGTERM; operations that have begun run to their end."""
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    forecasts = Forecasts()
    watch = Watch(context)
    filling = Filling(context, forecasts)

    def stop() -> None:
        try:
            context.keeper.stop()  # it ends both of its children in their order, this one first
        except OSError:
            ending.set()  # it has died

    commands = Commands(context, events, forecasts, start.paths.root, stop)
    info = Info(vendor="blksnap-ublk", product="blksnap-ublk", version=installed_version(), url="")
    server = Server(info, [ublk_interface(commands)])
    server.start(start.listener)
    watch.start()
    filling.start()
    start.ready()
    _log.info("serving")
    await ending.wait()
    await server.close()
    await asyncio.to_thread(commands.close)
    await asyncio.to_thread(filling.stop)
    await asyncio.to_thread(watch.stop)


if __name__ == "__main__":
    sys.exit(main())
