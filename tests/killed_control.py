# SPDX-License-Identifier: MIT
"""A daemon whose control process kills itself before a chosen step of an operation: what a kill -9 can leave behind.

Run as a program it starts the daemon, as `blksnap-ublkd` does. A step is a call of one of the functions below, each of
which changes something outside of the process. While the file `kill-before` is in the runtime directory the steps are
counted; the control process dies before the one whose number stands in it, and the file is gone then.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blksnap_ublk.cbt import History, saved_file
from blksnap_ublk.daemon import control, main
from blksnap_ublk.host import claim, pagecache
from blksnap_ublk.ioproc import messages
from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.runtime import RuntimePaths
from blksnap_ublk.snapshot import disks, releasing, storages
from blksnap_ublk.snapshot.catalogue import Catalogue
from blksnap_ublk.snapshot.freeze import Freezer
from blksnap_ublk.snapshot.io_link import IoLink
from blksnap_ublk.snapshot.state_files import StateFiles

STEPS: list[tuple[Any, list[str]]] = [
    (claim, ["open_exclusive"]),
    (pagecache, ["flush_disk"]),
    (storages, ["open_storage", "write_ahead", "hold"]),
    (releasing, ["release"]),
    (disks, ["write_back_and_stop"]),
    (disks.Disks, ["add_filtered", "add_image", "start", "stop", "delete", "resize"]),
    (Catalogue, ["put_device", "put_snapshot", "put_storage", "remove_device", "remove_snapshot", "remove_storage"]),
    (KeeperClient, ["put", "drop"]),
    (StateFiles, ["create", "remove"]),
    (History, ["create", "prepare", "commit", "destroy", "fold", "remove", "begin_resize", "end_resize"]),
    (saved_file, ["restore", "save", "write_mark"]),
    (Freezer, ["__enter__", "freeze", "thaw"]),
]


class Counter:
    """Counts the steps of this process."""

    def __init__(self, order: Path) -> None:
        self._order = order
        self._lock = threading.Lock()
        self._count = 0

    def step(self) -> None:
        """Before a step."""
        with self._lock:
            if not self._order.exists():
                self._count = 0
                return
            self._count += 1
            if self._count == int(self._order.read_text()):
                self._order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)

    def before(self, function: Callable[..., object]) -> Callable[..., object]:
        """The function as a step."""

        @functools.wraps(function)
        def counted(*arguments: object, **options: object) -> object:
            self.step()
            return function(*arguments, **options)

        return counted

    def before_call(self, function: Callable[..., object]) -> Callable[..., object]:
        """`IoLink.call`: questions are no steps."""

        @functools.wraps(function)
        def counted(link: IoLink, message: messages.Message, *arguments: object) -> object:
            if not isinstance(message, messages.Hello | messages.Status):
                self.step()
            return function(link, message, *arguments)

        return counted


def become_control() -> int:
    counter = Counter(RuntimePaths.from_environment().root / "kill-before")
    for owner, names in STEPS:
        for name in names:
            found = vars(owner)[name]
            if isinstance(found, classmethod):
                setattr(owner, name, classmethod(counter.before(found.__func__)))
            else:
                setattr(owner, name, counter.before(found))
    setattr(IoLink, "call", counter.before_call(IoLink.call))  # noqa: B010
    return control.main()


def start_daemon() -> int:
    def command(module: str) -> list[str]:
        program = [__file__] if module == control.__name__ else ["-m", module]
        return [sys.executable, "-P", *program]

    setattr(main, "_python", command)  # noqa: B010
    return main.main([])


if __name__ == "__main__":
    sys.exit(become_control() if "--runtime" in sys.argv else start_daemon())
