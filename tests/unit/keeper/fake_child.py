# SPDX-License-Identifier: MIT
"""A child of the keeper that does nothing but what its first argument says; run as a program.

serve [STATUS]      says that it serves, answers connections with its pid; at SIGTERM it sends "end" to io.sock, whose
                    process ends then, and ends with STATUS
refuse CODE TEXT    says why it cannot
die                 exits at once, without a word
deaf                serves, and does not end at SIGTERM
talk                serves, and logs without end
slow                as serve, but it takes a second until it stands by
All stand by until it is their turn; their answer is their pid, with a "!" if they are a lifeboat.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time

from blksnap_ublk.keeper.child import EXIT_HANDED_OVER, LEAVE, ChildStart
from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.log import start_log
from blksnap_ublk.keeper.successor import KeeperWatch

SLOW = 1.0


def main() -> int:
    split = sys.argv.index("--runtime")
    mode, *details = sys.argv[1:split]
    start = ChildStart.from_arguments(sys.argv[split:])
    start_log(mode)
    if mode == "refuse":
        start.failed(details[1], int(details[0]))
        return 1
    if mode == "die":
        return 3
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif mode in ("serve", "slow"):
        signal.signal(signal.SIGTERM, lambda *_: end(start, int(details[0]) if details else 0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    if "--successor" in sys.argv:
        watch = KeeperWatch(start)
        watch.start()
    if mode == "slow":
        time.sleep(SLOW)
    start.wait_for_turn()
    if "--successor" in sys.argv:
        watch.patience = 0.0
    if mode == "talk":
        threading.Thread(target=talk, daemon=True).start()
    if start.ring_lock is None:
        signal.signal(LEAVE, lambda *_: end(start, EXIT_HANDED_OVER))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [LEAVE])
    start.ready()
    while True:
        connection, _ = start.listener.accept()
        connection.send(f"{os.getpid()}{'!' if start.lifeboat else ''}".encode())
        if connection.recv(8) == b"end":
            return 0
        connection.close()


def talk() -> None:
    while True:
        logging.info("x" * 1000)
        time.sleep(0.0001)


def end(start: ChildStart, status: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(start.paths.io_socket))
        connection.send(b"end")
    with contextlib.suppress(OSError):
        KeeperClient(start.paths.keeper_socket).ending(status)
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
