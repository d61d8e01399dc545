# SPDX-License-Identifier: MIT
"""Runs a keeper with fake children; run as a program: RUNTIME IO_MODE CONTROL_MODE [OPTION]… Prints what it tells.

Options: `mount`: the state is a mounted tmpfs; `takeover`: replace the keeper that runs; `successor`: another one like
this is started when it dies; `log`: log to the file.
"""

import shlex
import sys
from pathlib import Path

from blksnap_ublk.keeper.keeper import Keeper, KeeperConfig
from blksnap_ublk.keeper.log import start_log
from blksnap_ublk.keeper.runtime import RuntimePaths
from blksnap_ublk.keeper.state_mount import enter_host

FAKE_CHILD = Path(__file__).with_name("fake_child.py")


def main() -> int:
    runtime, io_mode, control_mode, *options = sys.argv[1:]
    start_log("keeper")
    if "--host-namespace" in options:  # of one that died
        enter_host(int(options.pop()))
        options.remove("--host-namespace")
    config = KeeperConfig(
        paths=RuntimePaths(runtime),
        io_command=[sys.executable, str(FAKE_CHILD), *shlex.split(io_mode)],
        control_command=[sys.executable, str(FAKE_CHILD), *shlex.split(control_mode)],
        state_size=1 << 20 if "mount" in options else None,
        mount_state="mount" in options,
        log_to_file="log" in options,
        takeover="takeover" in options,
        successor=[sys.executable, __file__, runtime, io_mode, control_mode, *options]
        if "successor" in options
        else (),
    )
    return Keeper(config, lambda code, text: print(code, text, flush=True)).run()


if __name__ == "__main__":
    sys.exit(main())
