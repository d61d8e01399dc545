# SPDX-License-Identifier: MIT
"""udev, seen through the files and the socket that it keeps: does it run, what has it done with a device."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from blksnap_ublk.host import sysfs
from blksnap_ublk.host.number import DeviceNumber

RULES_DIRECTORIES = ("etc/udev/rules.d", "run/udev/rules.d", "usr/local/lib/udev/rules.d", "usr/lib/udev/rules.d",
                     "lib/udev/rules.d")  # fmt: skip
"""Where rules are, below the root; of files with the same name the first one counts."""

_LOOK = 0.01  # seconds between two looks


class Udev:
    """The udev of the host, or of a tree below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._run = root / "run/udev"

    def runs(self) -> bool:
        """Whether somebody listens for its commands: it runs, or is started when there is something to do."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as client:
            try:
                client.connect(str(self._run / "control"))
            except OSError:
                return False
        return True

    def rules(self, name: str) -> str | None:
        """The text of the rules file of that name which is in force; None where there is none."""
        for directory in RULES_DIRECTORIES:
            try:
                return (self._root / directory / name).read_text(errors="replace")
            except OSError:
                continue
        return None

    def links(self, number: DeviceNumber) -> list[str]:
        """The symlinks that it has made to a device, below `/dev`; empty for one that it does not know."""
        return sorted(line[2:] for line in self._known(number) if line.startswith("S:"))

    def property(self, number: DeviceNumber, key: str) -> str | None:
        """A property of a device; None where the device, or the property, is not known."""
        start = f"E:{key}="
        return next((line[len(start) :] for line in self._known(number) if line.startswith(start)), None)

    def idle(self) -> bool:
        """Whether it has handled all events so far."""
        return not (self._run / "queue").exists()

    def _known(self, number: DeviceNumber) -> list[str]:
        try:
            return (self._run / f"data/b{number}").read_text(errors="replace").splitlines()
        except OSError:
            return []


def announce_change(number: DeviceNumber) -> None:
    """Lets the kernel send a `change` event of a device, so that rules are applied once more. Raises OSError."""
    (sysfs.BLOCK_DEVICES / str(number) / "uevent").write_text("change")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits for a moment; whether it has come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(_LOOK)
    return True
