# SPDX-License-Identifier: MIT
"""The program that `helper` runs: one thing to do, its outcome on stdout."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys

from blksnap_ublk.ublk import partitions
from blksnap_ublk.ublk.control import Control
from blksnap_ublk.ublk.stopping import stop_device


def main(arguments: list[str]) -> None:
    """`start ID PID LIMIT`, `end-recovery ID PID LIMIT`, `quiesce ID LIMIT`, `stop ID LIMIT`, `force-stop ID LIMIT`.

    Or `look-for-partitions ID`, `hide-partitions ID`, which send no control command.
    Prints null, or {"errno": number, "text": text}.
    """
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        _run(arguments)
    except OSError as error:
        print(json.dumps({"errno": error.errno or errno.EIO, "text": error.strerror or str(error)}))
    else:
        print("null")
    sys.stdout.flush()
    os._exit(0)  # nothing here is worth the time of an orderly end of the interpreter


def _run(arguments: list[str]) -> None:
    match arguments:
        case ["look-for-partitions", device_id]:
            partitions.look(int(device_id))
        case ["hide-partitions", device_id]:
            partitions.hide(int(device_id))
        case _:
            with Control() as control:
                _command(control, arguments)


def _command(control: Control, arguments: list[str]) -> None:
    match arguments:
        case ["start", device_id, pid, timeout]:
            control.start(int(device_id), int(pid), timeout=float(timeout))
        case ["end-recovery", device_id, pid, timeout]:
            control.end_recovery(int(device_id), int(pid), timeout=float(timeout))
        case ["quiesce", device_id, timeout]:
            control.quiesce(int(device_id), timeout=float(timeout))
        case [("stop" | "force-stop") as word, device_id, timeout]:
            stop_device(control, int(device_id), force=word == "force-stop", timeout=float(timeout))
        case _:
            raise OSError(errno.EINVAL, f"no such call: {arguments}")


if __name__ == "__main__":
    main(sys.argv[1:])
