# SPDX-License-Identifier: MIT
"""For how long taking a snapshot holds new writes, and what their writers see of it.

    python bench/gate.py [--takes N] [--settings PATTERN]

Snapshots of several disks, and of one of 16 TiB, are taken while nobody writes and under full load. Beside the time
that the gates were closed stand what of it was `beyond` the end of the last write in flight, and the completion times
of writes, `between` takes and `during` them. Writes JSON and Markdown to bench/results/, and the Markdown to stdout.
Needs root, ublk, null_blk, fio.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from bench.report import machine
from blksnap_ublk.client import Client
from blksnap_ublk.forms import Freeze
from tests.null_block import missing_for_null_blocks, null_block
from tests.own_daemon import own_daemon

MIB = 1 << 20
RESULTS = Path(__file__).parent / "results"
SETTLE = 1.0
"""Seconds of load before the first take and after the last."""


@dataclass(frozen=True)
class Setting:
    """`devices` disks of `size` bytes; `depth` writes in flight to each under load."""

    name: str
    devices: int
    size: int
    delay_ns: int | None
    depth: int


SETTINGS = [
    Setting("8 RAM disks", 8, 32 * MIB, None, 16),
    Setting("8 disks of 10 ms", 8, 32 * MIB, 10_000_000, 4),
    Setting("1 RAM disk", 1, 32 * MIB, None, 16),
    Setting("1 RAM disk of 16 TiB", 1, 16 << 40, None, 16),
]


@dataclass(frozen=True)
class Times:
    """Completion times of `count` writes, in microseconds."""

    count: int
    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, nanoseconds: NDArray[np.int64]) -> Times | None:
        """None where there are none."""
        if len(nanoseconds) == 0:
            return None
        p50, p99 = np.percentile(nanoseconds, [50, 99]) / 1000
        return cls(len(nanoseconds), float(p50), float(p99), float(nanoseconds.max()) / 1000)

    def __str__(self) -> str:
        return f"{self.p50:.0f} / {self.p99:.0f} / {self.longest:.0f}"


@dataclass(frozen=True)
class Result:
    """`gates`: microseconds that each take held new writes, `beyond`: those after the last write in flight had ended.

    The times of writes are None where nobody writes.
    """

    setting: str
    load: str
    gates: list[int]
    beyond: list[int]
    between: Times | None
    during: Times | None


@dataclass(frozen=True)
class Span:
    """Of the call that took a snapshot; seconds since the epoch."""

    began: float
    ended: float


class Load:
    """fio writes 4 KiB at random to all devices, and keeps a log of the completion time of every write."""

    def __init__(self, setting: Setting, devices: Sequence[str], folder: Path) -> None:
        self._folder = folder
        command = [
            *("fio", "--output-format=json", "--ioengine=io_uring", "--direct=1", "--rw=randwrite", "--bs=4k"),
            *("--norandommap", "--randrepeat=0", f"--iodepth={setting.depth}", "--time_based", "--runtime=1d"),
            *("--allow_file_create=0", f"--write_lat_log={folder}/log", "--log_unix_epoch=1", "--thread"),
            *(option for n, device in enumerate(devices) for option in (f"--name=load{n}", f"--filename={device}")),
        ]
        self._process = subprocess.Popen(
            command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        )

    def stop(self) -> str:
        """Ends it; what fio said."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        return self._process.communicate(timeout=120)[0]

    def times(self, spans: Sequence[Span]) -> tuple[Times | None, Times | None]:
        """Of writes that ended between the spans, and of those that ended in one."""
        logs = [
            np.loadtxt(path, delimiter=",", usecols=(0, 1), ndmin=2) for path in self._folder.glob("log_clat.*.log")
        ]
        ended, taken = np.concatenate(logs).astype(np.int64).T
        inside = np.zeros(len(ended), dtype=np.bool_)
        for span in spans:
            inside |= (ended >= span.began * 1000) & (ended <= span.ended * 1000)
        first, last = spans[0].began * 1000, spans[-1].ended * 1000
        around = (ended >= first - SETTLE * 500) & (ended <= last + SETTLE * 500)
        return Times.of(taken[~inside & around]), Times.of(taken[inside])


def takes(client: Client, devices: Sequence[str], storage: str, count: int) -> tuple[list[int], list[int], list[Span]]:
    """Takes and destroys so many snapshots: `gates` and `beyond` of a Result, and when."""
    gates, beyond, spans = [], [], []
    for _ in range(count):
        began = time.time()
        snapshot = client.create_snapshot(devices, storage=[storage], freeze=Freeze.NO)
        spans.append(Span(began, time.time()))
        gates.append(snapshot.gate_us)
        beyond.append(snapshot.gate_us - snapshot.gate_writes_us)
        if client.show_snapshot(snapshot.id).state != "active":
            raise RuntimeError("a snapshot did not last: nothing was measured")
        client.destroy_snapshots([snapshot.id])
        time.sleep(0.2)
    return gates, beyond, spans


@contextmanager
def served(setting: Setting) -> Iterator[tuple[Client, list[str], str]]:
    """A client, the filtered devices and the disk for their difference storage."""
    with ExitStack() as stack:
        # All disks before the daemon, which must let them go before they are taken down.
        origins = [
            stack.enter_context(null_block(setting.size, delay_ns=setting.delay_ns)) for _ in range(setting.devices)
        ]
        storage = stack.enter_context(null_block(1024 * MIB, delay_ns=setting.delay_ns))
        client = stack.enter_context(stack.enter_context(own_daemon()).client())
        yield client, [client.attach(origin, queues=1).device for origin in origins], storage


def measure(setting: Setting, count: int) -> list[Result]:
    """Without a load, and with one."""
    with served(setting) as (client, devices, storage), tempfile.TemporaryDirectory() as folder:
        print(f"gate: {setting.name}: idle", file=sys.stderr, flush=True)
        gates, beyond, _ = takes(client, devices, storage, count)
        results = [Result(setting.name, "idle", gates, beyond, None, None)]
        print(f"gate: {setting.name}: full load", file=sys.stderr, flush=True)
        load = Load(setting, devices, Path(folder))
        try:
            time.sleep(2 * SETTLE)
            gates, beyond, spans = takes(client, devices, storage, count)
            time.sleep(SETTLE)
        finally:
            said = load.stop()
        between, during = load.times(spans)
        if between is None or during is None:
            raise RuntimeError(f"fio wrote nothing: {said[-500:]}")
        return [*results, Result(setting.name, "full", gates, beyond, between, during)]


def to_markdown(results: Sequence[Result]) -> str:
    """A table with a row for each result."""
    said = [f"{name} {value}" for name, value in machine().items()]
    lines = ["# Taking a snapshot", "", "; ".join(said) + ".", ""]
    lines += ["All in µs. Gates: median / longest; completion times of writes: p50 / p99 / longest.", ""]
    lines += ["| disks | load | takes | gate | beyond writes in flight | writes between takes | writes during takes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for each in results:
        held = " | ".join(f"{statistics.median(times):.0f} / {max(times)}" for times in (each.gates, each.beyond))
        writes = f"{each.between or '–'} | {each.during or '–'}"
        lines.append(f"| {each.setting} | {each.load} | {len(each.gates)} | {held} | {writes} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="How long taking a snapshot holds new writes.")
    parser.add_argument("--takes", type=int, default=20, help="of each setting and load (20)")
    parser.add_argument("--settings", default="*", metavar="PATTERN", help="which settings, by name")
    options = parser.parse_args()
    missing = missing_for_null_blocks() or (None if os.path.exists("/dev/ublk-control") else "no ublk")
    if missing:
        print(f"gate: {missing}", file=sys.stderr)
        return 1
    names = fnmatch.filter([setting.name for setting in SETTINGS], options.settings)
    results = [result for each in SETTINGS if each.name in names for result in measure(each, options.takes)]
    RESULTS.mkdir(exist_ok=True)
    name = f"gate-{time.strftime('%Y%m%dT%H%M%S')}-{os.uname().release}"
    document = {"machine": machine(), "results": [asdict(result) for result in results]}
    (RESULTS / f"{name}.json").write_text(json.dumps(document))
    (RESULTS / f"{name}.md").write_text(to_markdown(results))
    print(to_markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
