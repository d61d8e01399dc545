# SPDX-License-Identifier: MIT
"""dm devices whose table changes under way: parts that fail, disks that stop answering."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.loop_devices import run


@dataclass
class Mapped:
    """A dm device; `path` is its `/dev/dm-N`. A table line is `START SECTORS TARGET ARGUMENTS…`."""

    name: str
    path: str

    def load(self, *lines: str) -> None:
        """Another table in place of the present one."""
        _dmsetup_with_table(["load", self.name], lines)
        run("dmsetup", "suspend", "--noflush", self.name)
        self.resume()

    def suspend(self) -> None:
        """From now on requests wait; those under way are completed."""
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.name)

    def resume(self) -> None:
        """Requests that have waited go on."""
        run("dmsetup", "resume", self.name)

    def message(self, *words: str) -> None:
        """A message to the target at sector 0."""
        run("dmsetup", "message", self.name, "0", *words)


def missing_for_targets(*targets: str) -> str | None:
    """Why no dm device with these targets can be made here, or None."""
    if os.geteuid() != 0:
        return "not root"
    if not shutil.which("dmsetup"):
        return "no dmsetup"
    for target in targets:
        modprobe = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
        if modprobe:
            subprocess.run([modprobe, "-q", f"dm-{target}"], capture_output=True, check=False)
    known = subprocess.run(["dmsetup", "targets"], capture_output=True, text=True, check=False).stdout
    names = {line.split()[0] for line in known.splitlines() if line.strip()}
    missing = [target for target in targets if target not in names]
    return f"this kernel has no dm target {', '.join(missing)}" if missing else None


@contextmanager
def mapped_table(name: str, *lines: str) -> Iterator[Mapped]:
    """A dm device with this table, removed at the end, suspended or not."""
    _dmsetup_with_table(["create", name], lines)
    try:
        minor = run("dmsetup", "info", "-c", "--noheadings", "-o", "minor", name)
        yield Mapped(name, f"/dev/dm-{minor}")
    finally:
        run("dmsetup", "resume", name)
        run("dmsetup", "remove", "--retry", name)


def _dmsetup_with_table(arguments: list[str], lines: tuple[str, ...]) -> None:
    done = subprocess.run(["dmsetup", *arguments], input="\n".join(lines) + "\n", capture_output=True, text=True)
    assert done.returncode == 0, f"dmsetup {arguments} {lines}: {done.stderr}"
