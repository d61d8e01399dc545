# SPDX-License-Identifier: MIT
"""One run of one fio job file on one device."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

JOBS = Path(__file__).parent / "jobs"
LIMIT = 600.0
"""Seconds after which a run counts as hung."""


@dataclass(frozen=True)
class Job:
    """How fio is run: `engine` is its ioengine, `seconds` at most, over the first `size` bytes of a device."""

    engine: str
    seconds: float
    size: int


@dataclass(frozen=True)
class Speed:
    """What a run found: requests per second, and completion times of requests in microseconds."""

    iops: float
    p50_us: float
    p99_us: float


def measure(cell: str, device: str, job: Job) -> Speed:
    """Runs the job file of a cell. Raises RuntimeError with fio's words when it fails."""
    environment = os.environ | {
        "DEVICE": device,
        "SIZE": str(job.size),
        "RUNTIME": f"{int(job.seconds * 1000)}ms",
        "ENGINE": job.engine,
    }
    command = ["fio", "--output-format=json", "--allow_file_create=0", str(JOBS / f"{cell}.fio")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT, cwd="/", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"fio {cell} on {device}: {done.stderr.strip() or done.stdout[-500:]}")
    # fio may say something before its document.
    document = json.loads(done.stdout[done.stdout.index("{") :])
    found = document["jobs"][0]["read" if "read" in cell else "write"]
    times = found["clat_ns"]["percentile"]
    return Speed(found["iops"], times["50.000000"] / 1000, times["99.000000"] / 1000)


def write_all(device: str, size: int) -> None:
    """Writes every block of a device once, so that no later write is the first."""
    command = ["dd", "if=/dev/zero", f"of={device}", "bs=1M", f"count={size >> 20}", "oflag=direct", "status=none"]
    subprocess.run(command, check=True, timeout=LIMIT)
