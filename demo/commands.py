# SPDX-License-Identifier: MIT
"""Running commands: those of the system, and our own command line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from demo.narration import NotAsPromised, tell

BLKSNAP = [sys.executable, "-m", "blksnap_ublk.cli.main"]
LIMIT = 900.0
"""Seconds that a command may take; an emulated machine is slow."""


def run(*command: str) -> str:
    """The standard output of a command of the system. Raises NotAsPromised with its messages when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode != 0:
        raise NotAsPromised(f"`{' '.join(command)}` failed ({done.returncode}): {done.stderr.strip() or done.stdout}")
    return done.stdout.strip()


def blksnap(*arguments: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs our command line, and shows what a user would type and see.

    Raises NotAsPromised when its exit code is not the `expected` one.
    """
    shown = " ".join(argument for argument in arguments if argument != "--json")
    done = subprocess.run([*BLKSNAP, *arguments], capture_output=True, text=True, timeout=LIMIT)
    tell(f"# blksnap-ublk {shown}")
    for line in done.stderr.splitlines():
        tell(f"  {line}")
    if done.returncode != expected:
        raise NotAsPromised(f"`blksnap-ublk {shown}` ended with {done.returncode}, not {expected}: {done.stderr}")
    return done


def blksnap_json(*arguments: str) -> dict[str, Any]:
    """The JSON document that a command of ours prints."""
    document: dict[str, Any] = json.loads(blksnap(*arguments, "--json").stdout)
    return document
