# SPDX-License-Identifier: MIT
"""The control process: `python -m blksnap_ublk.daemon.control`, a child of the keeper.

It decides, the io process serves. Killed at any moment another one takes over, reads the catalogue, and goes on; nobody
who uses a filtered device or an image notices. That other one waits until then, with everything imported that it may
ever need: the file system that our program lies on may wait for exactly this process.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from blksnap_ublk.daemon.commands import Commands
from blksnap_ublk.daemon.ending import end
from blksnap_ublk.daemon.events import EventLog
from blksnap_ublk.daemon.forecast import Forecasts
from blksnap_ublk.daemon.interface import ublk_interface
from blksnap_ublk.daemon.leaving import leave
from blksnap_ublk.daemon.watch import Watch
from blksnap_ublk.errors import BlksnapError, Unsupported, from_os_error
from blksnap_ublk.keeper.child import (
    ALIVE_INTERVAL,
    EXIT_DEVICES_LEFT,
    EXIT_HANDED_OVER,
    EXIT_NOTHING_LEFT,
    LEAVE,
    TURN,
    ChildStart,
)
from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.log import start_log
from blksnap_ublk.keeper.memory import lock_present_memory
from blksnap_ublk.keeper.runtime import RuntimePaths
from blksnap_ublk.keeper.service_manager import survive_shutdown
from blksnap_ublk.keeper.successor import KeeperWatch
from blksnap_ublk.snapshot.catalogue import Catalogue
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.disks import Disks
from blksnap_ublk.snapshot.filling import Filling
from blksnap_ublk.snapshot.io_link import IoLink
from blksnap_ublk.snapshot.reconcile import reconcile
from blksnap_ublk.snapshot.state_files import StateFiles
from blksnap_ublk.snapshot.storage import DescriptorRegistry
from blksnap_ublk.ublk.control import Control
from blksnap_ublk.ublk.protection import protect_process
from blksnap_ublk.varlink.introspection import Info
from blksnap_ublk.varlink.server import Server
from blksnap_ublk.version import installed_version

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Stands by until it is this process' turn, then runs until SIGTERM, or LEAVE for a takeover.

    The exit status tells the keeper whether devices are left.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hooks", type=Path)
    parser.add_argument("--saved", type=Path)
    own, rest = parser.parse_known_args(arguments)
    start = ChildStart.from_arguments(rest)
    start_log("control")
    survive_shutdown()
    installed_version()  # reads files, which is too late later
    # When it makes memory free, the kernel must not wait for a device that waits for this process.
    protect_process(lock_memory=False)
    lock_present_memory()
    asked_to_end = _hear_of_the_end()
    keeper_watch = KeeperWatch(start)
    keeper_watch.start()
    start.wait_for_turn()
    keeper_watch.patience = 0.0
    with ExitStack() as stack:
        try:
            events = EventLog(start.paths.state / "events")
            context = _context(start.paths, own, events, stack)
            reconcile(context)
        except (BlksnapError, OSError) as error:
            failure = error if isinstance(error, BlksnapError) else from_os_error(error)
            start.failed(failure.message, failure.exit_code)
            keeper_watch.outlast()
            return failure.exit_code
        leaving = asyncio.run(_serve(start, context, events, asked_to_end))
        keeper_watch.stop()
        if leaving:
            leave(context)
            # The next one waits for the end of this one.
            os._exit(EXIT_HANDED_OVER)
        status = EXIT_NOTHING_LEFT if end(context) else EXIT_DEVICES_LEFT
        with suppress(OSError):
            context.keeper.ending(status)
        return status


def _hear_of_the_end() -> threading.Event:
    """Set by SIGTERM: one that comes before this process serves is heeded when it does, the end being orderly then."""
    asked = threading.Event()
    for number in _END_SIGNALS:
        signal.signal(number, lambda *_: asked.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _END_SIGNALS)
    return asked


def _keeper(path: Path) -> KeeperClient:
    """Of the keeper that lives; where that has just died another one is waited for, however long that takes.

    It is this process that starts it; and none would start this process again.
    """
    while True:
        try:
            return KeeperClient(path)
        except OSError as error:
            _log.error("waiting for a keeper: %s", error)


def _context(paths: RuntimePaths, own: argparse.Namespace, events: EventLog, stack: ExitStack) -> Context:
    try:
        control = stack.enter_context(Control())
    except OSError as error:
        raise Unsupported(error.strerror or str(error), subject=error.filename) from None
    keeper = stack.enter_context(_keeper(paths.keeper_socket))
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
        hooks=own.hooks,
        saved=own.saved,
    )


async def _serve(start: ChildStart, context: Context, events: EventLog, asked_to_end: threading.Event) -> bool:
    """Answers calls until SIGTERM, or LEAVE: then it is True. Operations that have begun run to their end."""
    ending = asyncio.Event()
    leaving = False
    loop = asyncio.get_running_loop()
    for number in _END_SIGNALS:
        loop.add_signal_handler(number, ending.set)
    if asked_to_end.is_set():
        ending.set()

    def begin_to_leave() -> None:
        nonlocal leaving
        leaving = True
        ending.set()

    loop.add_signal_handler(LEAVE, begin_to_leave)
    signal.signal(TURN, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (TURN, LEAVE))
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
    while not ending.is_set():
        start.alive()
        with suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), ALIVE_INTERVAL)
    await server.close()
    await asyncio.to_thread(commands.close)
    await asyncio.to_thread(filling.stop)
    await asyncio.to_thread(watch.stop)
    return leaving


if __name__ == "__main__":
    sys.exit(main())
