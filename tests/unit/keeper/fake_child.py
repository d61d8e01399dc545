# SPDX-License-Identifier: MIT
"""A child of the keeper that does nothing but what its first argument says; run as a program.

serve [STATUS]      says that it serves, answers connections with its pid; at SIGTERM it sends "end" to io.sock, whose
                    process ends then, and ends with STATUS
refuse CODE TEXT    says why it cannot
die                 exits at once, without a word
deaf                serves, and does not end at SIGTERM
"""

import os
import signal
import socket
import sys

from blksnap_ublk.keeper.child import ChildStart


def main() -> int:
    split = sys.argv.index("--runtime")
    mode, *details = sys.argv[1:split]
    start = ChildStart.from_arguments(sys.argv[split:])
    match mode:
        case "refuse":
            start.failed(details[1], int(details[0]))
            return 1
        case "die":
            return 3
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "serve":
            signal.signal(signal.SIGTERM, lambda *_: end(start, int(details[0]) if details else 0))
    start.ready()
    while True:
        connection, _ = start.listener.accept()
        connection.send(str(os.getpid()).encode())
        if connection.recv(8) == b"end":
            return 0
        connection.close()


def end(start: ChildStart, status: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(start.paths.io_socket))
        connection.send(b"end")
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
