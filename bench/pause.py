# SPDX-License-Identifier: MIT
"""For how long users of a filtered device wait when the process that serves it is killed under load."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack

from bench.document import Pauses
from bench.measure import Job, write_all, written_meanwhile
from bench.progress import say
from tests.direct_io import read_at
from tests.killing import mortal_daemon, pid_of
from tests.null_block import null_block
from tests.own_daemon import wait_until

SIZE = 64 << 20
RECOVERED = 2.0
"""Seconds between two deaths, so that a successor is ready again."""


def measure_pauses(count: int) -> list[Pauses]:
    """So many deaths with a snapshot held, and with none."""
    return [_measure(snapshots, count) for snapshots in (0, 1)]


def _measure(snapshots: int, count: int) -> Pauses:
    setting = f"{snapshots} snapshots held"
    say(f"pause after a death, {setting}")
    with ExitStack() as stack:
        origin, storage = (stack.enter_context(null_block(SIZE)) for _ in range(2))
        write_all(origin, SIZE)
        daemon = stack.enter_context(mortal_daemon())
        client = stack.enter_context(daemon.client())
        device = client.attach(origin, queues=1).device
        for _ in range(snapshots):
            client.create_snapshot([device], storage=[storage])
        stack.enter_context(written_meanwhile(device, Job("io_uring", 0.0, SIZE, SIZE)))
        seconds = []
        for _ in range(count):
            time.sleep(RECOVERED)
            wait_until("a successor is ready", lambda: None not in (pid_of(daemon, "io"), pid_of(daemon, "io-spare")))
            victim = daemon.pid("io")
            began = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            read_at(device, 0, 4096)
            seconds.append(time.monotonic() - began)
            wait_until("another serves", lambda victim=victim: pid_of(daemon, "io") not in (None, victim))  # type: ignore[misc]
        for snapshot in client.list_snapshots():
            if snapshot.state != "active":
                raise RuntimeError(f"a snapshot is {snapshot.state} after the deaths")
    return Pauses(setting, seconds)
