# SPDX-License-Identifier: MIT
"""A daemon in whose control process a chosen step of an operation fails, as it does where memory for state lacks.

Run as a program it starts the daemon, as `blksnap-ublkd` does. While the file `fail` is in the runtime directory, which
holds the name of a step and a number, that step fails with ENOSPC from its so many-th call on.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blksnap_ublk.cbt import History
from blksnap_ublk.daemon import control, main
from blksnap_ublk.keeper.runtime import RuntimePaths
from blksnap_ublk.snapshot import adopting, attach, buffers
from blksnap_ublk.snapshot.disks import Disks

STEPS: list[tuple[Any, Callable[..., Any]]] = [
    (History, History.commit),
    (Disks, Disks.start),
    (Disks, Disks.end_recovery),
    (adopting, adopting.adopt),
    (attach, attach.open_at_io),
    (buffers, buffers.tell_unstored),
]


def failing(function: Callable[..., Any], order: Path) -> Callable[..., Any]:
    """The function, which fails where the file says so."""
    calls = 0

    @functools.wraps(function)
    def run(*arguments: object, **named: object) -> object:
        nonlocal calls
        try:
            step, first = order.read_text().split()
        except FileNotFoundError:
            calls = 0
            return function(*arguments, **named)
        if step == function.__name__:
            calls += 1
            if calls >= int(first):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments, **named)

    return run


def become_control() -> int:
    order = RuntimePaths.from_environment().root / "fail"
    for owner, function in STEPS:
        setattr(owner, function.__name__, failing(function, order))
    return control.main()


def start_daemon() -> int:
    def command(module: str) -> list[str]:
        program = [__file__] if module == control.__name__ else ["-m", module]
        return [sys.executable, "-P", *program]

    setattr(main, "_python", command)  # noqa: B010
    return main.main([])


if __name__ == "__main__":
    sys.exit(become_control() if "--runtime" in sys.argv else start_daemon())
