# SPDX-License-Identifier: MIT
"""A udev of the test's own. Only for guests: there is one udev for all of a machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from blksnap_ublk.host.udev import Udev, wait_until
from blksnap_ublk.install.udev_rules import RULES_NAME, rules_text

PROGRAMS = ("/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd")
_RULES = Path("/run/udev/rules.d")


def missing_for_udev() -> str | None:
    """Why no udev can be started here, or None."""
    if "BLKSNAP_GUEST" not in os.environ:
        return "not in a guest: a machine has one udev for everybody"
    if Udev().runs():
        return "a udev runs already"
    return None if any(map(os.path.exists, PROGRAMS)) else "no systemd-udevd"


@contextmanager
def udev(runtime: Path, *, knows_ublk: bool) -> Iterator[None]:
    """A udev that runs, with the distribution's rules and ours for a daemon with that runtime directory.

    `knows_ublk`: whether the distribution's are those that know ublk devices (systemd 257), or those that do not.
    """
    _RULES.mkdir(parents=True, exist_ok=True)
    for name in ("60-persistent-storage.rules", "60-block.rules"):
        text = Udev().rules(name) or ""
        assert "|sd*|" in text
        others = text.replace("|ublk*|", "|").replace("|ublkb*|", "|").replace('|ublk*"', '"').replace('|ublkb*"', '"')
        (_RULES / name).write_text(others.replace("|sd*|", "|sd*|ublkb*|") if knows_ublk else others)
    (_RULES / RULES_NAME).write_text(rules_text(runtime))
    program = next(path for path in PROGRAMS if os.path.exists(path))
    with tempfile.TemporaryFile("w+") as log:
        yield from _running(program, log)
        log.seek(0)
        complaints = [line for line in log if RULES_NAME in line]
        assert not complaints, complaints


def _running(program: str, log: IO[str]) -> Iterator[None]:
    process = subprocess.Popen([program, "--resolve-names=never"], stdin=subprocess.DEVNULL, stderr=log)
    try:
        assert wait_until(Udev().runs, 30)
        settle()
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
        shutil.rmtree("/run/udev", ignore_errors=True)


def settle() -> None:
    """Waits until all events so far are handled."""
    subprocess.run(["udevadm", "settle", "--timeout=30"], check=True)


def change(*devices: str) -> None:
    """Lets the rules be applied to devices once more."""
    subprocess.run(["udevadm", "trigger", "--settle", "--action=change", *devices], check=True, timeout=60)
