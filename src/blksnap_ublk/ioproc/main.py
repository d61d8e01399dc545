# SPDX-License-Identifier: MIT
"""The io process, as the keeper starts it."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from blksnap_ublk.ioproc.server import IoServer
from blksnap_ublk.keeper.child import ChildStart
from blksnap_ublk.keeper.log import start_log
from blksnap_ublk.keeper.service_manager import survive_shutdown
from blksnap_ublk.rpc.loop import Loop
from blksnap_ublk.ublk.protection import protect_process

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Stand by until it is this process' turn, then serve until the message Shutdown, or SIGKILL; does not return.

    Queues that still serve a device then are left to recovery: the process ends under them as if it had been killed,
    which every part of the design must withstand anyway.
    """
    start = ChildStart.from_arguments(sys.argv[1:] if arguments is None else arguments)
    start_log("io")
    survive_shutdown()
    # In the first thread, before any other exists: all others inherit it.
    io_flusher = protect_process()
    loop = Loop()
    # A system that shuts down sends SIGTERM to all at once, while file systems above are still mounted.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    start.wait_for_turn()
    ring_lock = -1 if start.ring_lock is None else start.ring_lock
    try:
        IoServer(loop, start.listener, ring_lock=ring_lock, io_flusher=io_flusher, lifeboat=start.lifeboat)
    except OSError as error:
        log.exception("the io process cannot serve")
        start.failed(f"the io process cannot serve: {error}")
        sys.exit(1)
    start.ready()
    loop.run()
    log.info("ended")
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
