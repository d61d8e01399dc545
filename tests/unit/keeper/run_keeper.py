# SPDX-License-Identifier: MIT
"""Runs a keeper with fake children; run as a program: RUNTIME IO_MODE CONTROL_MODE [mount]. Prints what it tells."""

import shlex
import sys
from pathlib import Path

from blksnap_ublk.keeper.keeper import Keeper, KeeperConfig
from blksnap_ublk.keeper.log import start_log
from blksnap_ublk.keeper.runtime import RuntimePaths

FAKE_CHILD = Path(__file__).with_name("fake_child.py")


def main() -> int:
    runtime, io_mode, control_mode, *rest = sys.argv[1:]
    start_log("keeper")
    config = KeeperConfig(
        paths=RuntimePaths(runtime),
        io_command=[sys.executable, str(FAKE_CHILD), *shlex.split(io_mode)],
        control_command=[sys.executable, str(FAKE_CHILD), *shlex.split(control_mode)],
        state_size=1 << 20 if rest else None,
        mount_state=bool(rest),
    )
    return Keeper(config, lambda code, text: print(code, text, flush=True)).run()


if __name__ == "__main__":
    sys.exit(main())
