# SPDX-License-Identifier: MIT
"""For how long taking a snapshot holds new writes, and what their writers see of it.

Snapshots of several disks, and of one of up to 16 TiB, are taken while nobody writes and under full load. Beside the
time that the gates were closed stand what of it was `beyond` the end of the last write in flight, and the completion
times of writes, `between` takes and `during` them.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.contenders.filtered import emptied
from bench.document import Gate, Times
from bench.progress import say
from blksnap_ublk.client import Client
from blksnap_ublk.forms import Freeze
from tests.null_block import null_block

MIB = 1 << 20
SETTLE = 1.0
"""Seconds of load before the first take and after the last."""


@dataclass(frozen=True)
class Setting:
    """`devices` disks of `size` bytes; `depth` writes in flight to each under load. `short`: part of the short form."""

    name: str
    devices: int
    size: int
    delay_ns: int | None
    depth: int
    short: bool = False


SETTINGS = [
    Setting("8 RAM disks", 8, 32 * MIB, None, 16, short=True),
    Setting("8 disks of 10 ms", 8, 32 * MIB, 10_000_000, 4),
    Setting("1 RAM disk", 1, 32 * MIB, None, 16, short=True),
    Setting("1 RAM disk of 1 TiB", 1, 1 << 40, None, 16),
    Setting("1 RAM disk of 16 TiB", 1, 16 << 40, None, 16, short=True),
]


def times_of(nanoseconds: NDArray[np.int64]) -> Times | None:
    """Of completion times; None where there are none."""
    if len(nanoseconds) == 0:
        return None
    p50, p99 = np.percentile(nanoseconds, [50, 99]) / 1000
    return Times(len(nanoseconds), float(p50), float(p99), float(nanoseconds.max()) / 1000)


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
        return times_of(taken[~inside & around]), times_of(taken[inside])


def takes(client: Client, devices: Sequence[str], storage: str, count: int) -> tuple[list[int], list[int], list[Span]]:
    """Takes and destroys so many snapshots: `gates` and `beyond` of a Gate, and when."""
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
def served(setting: Setting, client: Client) -> Iterator[tuple[list[str], str]]:
    """The filtered devices and the disk for their difference storage."""
    with ExitStack() as stack:
        origins = [
            stack.enter_context(null_block(setting.size, delay_ns=setting.delay_ns)) for _ in range(setting.devices)
        ]
        storage = stack.enter_context(null_block(1024 * MIB, delay_ns=setting.delay_ns))
        stack.enter_context(emptied(client))
        yield [client.attach(origin, queues=1).device for origin in origins], storage


def measure(setting: Setting, count: int, client: Client) -> list[Gate]:
    """Without a load, and with one."""
    with served(setting, client) as (devices, storage), tempfile.TemporaryDirectory() as folder:
        say(f"gate, {setting.name}: idle")
        gates, beyond, _ = takes(client, devices, storage, count)
        results = [Gate(setting.name, "idle", gates, beyond, None, None)]
        say(f"gate, {setting.name}: full load")
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
        return [*results, Gate(setting.name, "full", gates, beyond, between, during)]


def measure_gates(form: str, count: int, client: Client) -> Iterator[Gate]:
    """So many takes of each setting and load; `client` is of a daemon that serves nothing."""
    for setting in SETTINGS:
        if form == "full" or setting.short:
            yield from measure(setting, count, client)
