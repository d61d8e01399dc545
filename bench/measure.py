# SPDX-License-Identifier: MIT
"""One run of one fio job file on one device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.document import Speed

JOBS = Path(__file__).parent / "jobs"
LIMIT = 600.0
"""Seconds after which a run counts as hung."""
SPREAD = 256 << 10
"""Bytes: of the jobs named spread-…, each write has a range of this size for itself."""


@dataclass(frozen=True)
class Job:
    """How fio is run: `engine` is its ioengine, `seconds` at most, over the first `size` bytes of a device.

    Jobs named spread-… go over `spread_size` bytes.
    """

    engine: str
    seconds: float
    size: int
    spread_size: int


def measure(cell: str, device: str, job: Job) -> Speed:
    """Runs the job file of a cell. Raises RuntimeError with fio's words when it fails."""
    document = _fio(JOBS / f"{cell}.fio", job, {"DEVICE": device, "SPREAD_WRITES": str(job.spread_size // SPREAD)})
    found = document["jobs"][0]
    if found["error"]:
        raise RuntimeError(f"fio {cell} on {device}: error {found['error']}")
    return _speed(found)


def measure_in_turn(cell: str, devices: Sequence[str], job: Job) -> list[Speed | None]:
    """Runs the job file of a cell on one device after the other, in one process; None for those that it failed on.

    A device may come more than once. Raises RuntimeError when fio fails altogether.
    """
    whole, section = (JOBS / f"{cell}.fio").read_text().split(f"[{cell}]")
    runs = [f"[run{n}]\nstonewall=1\nfilename={device}{section}" for n, device in enumerate(devices)]
    with tempfile.NamedTemporaryFile("w", suffix=".fio") as file:
        file.write("\n".join([whole.replace("filename=${DEVICE}\n", ""), *runs]))
        file.flush()
        jobs = _fio(Path(file.name), job, {})["jobs"]
    return [None if found["error"] else _speed(found) for found in jobs]


def _fio(file: Path, job: Job, environment: dict[str, str]) -> Any:
    """What fio says after running a job file."""
    spread = file.name.startswith("spread-")
    environment = {
        **os.environ,
        **environment,
        "SIZE": str(job.spread_size if spread else job.size),
        "RUNTIME": f"{int(job.seconds * 1000)}ms",
        "ENGINE": job.engine,
    }
    command = ["fio", "--output-format=json", "--allow_file_create=0", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT, cwd="/", check=False)
    start = done.stdout.find("{")
    # fio may say something before its document; single jobs that fail say so in it.
    if start < 0 or (done.returncode != 0 and '"error"' not in done.stdout):
        raise RuntimeError(f"fio {file.name}: {done.stderr.strip() or done.stdout[-500:]}")
    return json.loads(done.stdout[start:])


def _speed(found: Any) -> Speed:
    """Of a job in fio's document."""
    kinds = [found[kind] for kind in ("write", "read") if found[kind]["total_ios"]]
    # Of a mixture of reads and writes, the completion times are those of writes.
    times = kinds[0]["lat_ns"]["percentile"]
    return Speed(sum(kind["iops"] for kind in kinds), times["50.000000"] / 1000, times["99.000000"] / 1000)


def write_all(device: str, size: int) -> None:
    """Writes every block of the first `size` bytes of a device once, so that no later write is the first."""
    command = ["dd", "if=/dev/zero", f"of={device}", "bs=1M", f"count={size >> 20}", "oflag=direct", "status=none"]
    subprocess.run(command, check=True, timeout=LIMIT)


@contextmanager
def written_meanwhile(device: str, job: Job) -> Iterator[None]:
    """fio writes 4 KiB at random, one at a time, while the block runs. Raises RuntimeError if it ends before."""
    command = [
        *("fio", "--name=writer", f"--filename={device}", "--allow_file_create=0", f"--ioengine={job.engine}"),
        *("--direct=1", "--rw=randwrite", "--bs=4k", "--norandommap", "--randrepeat=0", f"--size={job.size}"),
        *("--time_based", "--runtime=1d", "--minimal"),
    ]
    writer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/")
    try:
        yield
        if writer.poll() is not None:
            raise RuntimeError(f"the writer to {device} ended with status {writer.returncode}: nothing was measured")
    finally:
        writer.send_signal(signal.SIGINT)
        try:
            writer.wait(60)
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()
