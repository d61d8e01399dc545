# SPDX-License-Identifier: MIT
"""What figures are measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from bench.build_kublk import PROGRAM
from bench.contenders.qemu import qemu_version
from blksnap_ublk.version import installed_version


def machine() -> dict[str, str | int]:
    """Machine, kernel and versions, by name."""
    fio = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "blksnap-ublk": installed_version(),
        "kernel": platform.release(),
        "guest": os.environ.get("BLKSNAP_GUEST") or "none",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": os.cpu_count() or 0,
        "python": platform.python_version(),
        "fio": fio.removeprefix("fio-"),
        "qemu": qemu_version(),
        "kublk": "built" if PROGRAM.exists() else "none",
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
