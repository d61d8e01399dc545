# SPDX-License-Identifier: MIT
"""Runs a keeper with fake children; run as a program: RUNTIME IO_MODE CONTROL_MODE [OPTION]… Prints what it tells.

Options: `mount`: the state is a mounted tmpfs; `takeover`: replace the keeper that runs; `successor`: another one like
this is started when it dies, but for how it dies; `succeeds`: this is such a one; `log`: log to the file. By SIGKILL
it dies with `dies-unrecorded=NAME`: before it writes down that somebody is NAME; `dies-recorded`: after it wrote down
anything; `dies-untold=N`: before it tells the N-th process that it is its turn.
"""

import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from blksnap_ublk.keeper.child import TURN
from blksnap_ublk.keeper.keeper import Keeper, KeeperConfig
from blksnap_ublk.keeper.log import start_log
from blksnap_ublk.keeper.process import Process
from blksnap_ublk.keeper.processes import ProcessesFile, Record
from blksnap_ublk.keeper.runtime import RuntimePaths
from blksnap_ublk.keeper.state_mount import enter_host

FAKE_CHILD = Path(__file__).with_name("fake_child.py")


def main() -> int:
    runtime, io_mode, control_mode, *options = sys.argv[1:]
    start_log("keeper")
    if "--host-namespace" in options:  # of one that died
        enter_host(int(options.pop()))
        options.remove("--host-namespace")
    for option in [each for each in options if each.startswith("dies-")]:
        options.remove(option)
        moment, _, detail = option.partition("=")
        DEATHS[moment](detail)
    config = KeeperConfig(
        paths=RuntimePaths(runtime),
        io_command=[sys.executable, str(FAKE_CHILD), *shlex.split(io_mode)],
        control_command=[sys.executable, str(FAKE_CHILD), *shlex.split(control_mode)],
        state_size=1 << 20 if "mount" in options else None,
        mount_state="mount" in options,
        log_to_file="log" in options,
        takeover="takeover" in options,
        succeeds="succeeds" in options,
        successor=[sys.executable, __file__, runtime, io_mode, control_mode, *options]
        if "successor" in options
        else (),
    )
    return Keeper(config, lambda code, text: print(code, text, flush=True)).run()


def dies_unrecorded(name: str) -> None:
    write = ProcessesFile.write

    def write_or_die(self: ProcessesFile, record: Record) -> None:
        if name in record.processes:
            die()
        write(self, record)

    ProcessesFile.write = write_or_die  # type: ignore[method-assign]


def dies_recorded(_: str) -> None:
    write = ProcessesFile.write

    def write_and_die(self: ProcessesFile, record: Record) -> None:
        write(self, record)
        die()

    ProcessesFile.write = write_and_die  # type: ignore[method-assign]


def dies_untold(which: str) -> None:
    send, turns = Process.signal, itertools.count(1)

    def send_or_die(self: Process, number: int) -> None:
        if number == TURN and next(turns) == int(which):
            die()
        send(self, number)

    Process.signal = send_or_die  # type: ignore[method-assign]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


DEATHS: dict[str, Callable[[str], None]] = {
    "dies-unrecorded": dies_unrecorded,
    "dies-recorded": dies_recorded,
    "dies-untold": dies_untold,
}

if __name__ == "__main__":
    sys.exit(main())
