# SPDX-License-Identifier: MIT
"""Stands for the daemon's main module where its start is tested: serves a FakeService, or fails as told.

What to do is in the environment variable SMALL_DAEMON: `serve`, `slow`, `say:CODE:TEXT`, `complain:CODE:TEXT`, `hang`,
`die`.
"""

import argparse
import asyncio
import os
import socket
import sys
import time

from blksnap_ublk.daemon.interface import ublk_interface
from blksnap_ublk.varlink.server import Server
from tests.unit.fake_service import FakeService
from tests.unit.serving import INFO


class Stoppable(FakeService):
    """Ends when told."""

    def __init__(self) -> None:
        super().__init__()
        self.end = asyncio.Event()

    async def stop(self) -> None:
        self.end.set()


async def serve(ready: int) -> None:
    path = os.path.join(os.environ["BLKSNAP_UBLK_RUN"], "io.blksnap.Ublk")
    with socket.socket(socket.AF_UNIX) as listening:
        try:
            listening.bind(path)
        except OSError:
            sys.exit(say(ready, 4, "another one runs (pid 1)"))
        listening.listen()
        service = Stoppable()
        server = Server(INFO, [ublk_interface(service)])
        server.start(listening)
        say(ready, 0, "ready")
        await service.end.wait()
        await server.close()
        os.unlink(path)


def say(ready: int, code: int, text: str) -> int:
    os.write(ready, text.encode() + b"\n")
    os.close(ready)
    return code


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--hooks")
    options = parser.parse_args()
    ready: int = options.ready_fd
    with open(os.path.join(os.environ["BLKSNAP_UBLK_RUN"], "started"), "a") as started:
        started.write(f"{os.getpid()} {os.getcwd()} {os.getsid(0) == os.getpid()}\n")
    if options.hooks is not None:
        with open(os.path.join(os.environ["BLKSNAP_UBLK_RUN"], "hooks"), "w") as told:
            told.write(options.hooks)
    what, _, rest = os.environ["SMALL_DAEMON"].partition(":")
    code, _, text = rest.partition(":")
    match what:
        case "say":
            return say(ready, int(code), text)
        case "complain":
            print(f"Traceback (most recent call last):\n  somewhere\n{text}", file=sys.stderr)
            return int(code)
        case "die":
            os.abort()
        case "hang":
            time.sleep(600)
        case "slow":
            time.sleep(0.3)
    asyncio.run(serve(ready))
    return 0


if __name__ == "__main__":
    sys.exit(main())
