# SPDX-License-Identifier: MIT
"""Snapshots that come and go leave nothing: descriptors, memory, threads, ublk devices and state files stay as many.

BSU_FLAT_ROUNDS is the number of rounds; 1000 take half an hour in a slow guest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from tests.direct_io import read_at, write_at
from tests.killing import EVERYBODY
from tests.loop_devices import loop_device, missing_for_loops
from tests.own_daemon import OwnDaemon, ublk_nodes, wait_until

MIB = 1 << 20
SIZE = 4 * MIB
ROUNDS = int(os.environ.get("BSU_FLAT_ROUNDS", "60"))
WARM = 40
"""Rounds after which all is there that stays."""

OTHER_DEVICE = 10
"""Once in so many rounds a device is attached and detached as well."""

SLACK = dict.fromkeys(EVERYBODY, 512) | {"control": 12 << 10}
"""KiB of memory that a process may take in all rounds together: control keeps thousands of events. In 1000 rounds it
took 10 MiB, most of it in the first 600, and 0.4 MiB in the last 200."""

missing = missing_for_loops()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@dataclass(frozen=True)
class Used:
    """What a process has; `memory` in KiB."""

    descriptors: int
    threads: int
    mappings: int
    memory: int

    @classmethod
    def of(cls, pid: int) -> Used:
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        memory = int(status["RssAnon"].split()[0]) + int(status["RssShmem"].split()[0])
        mappings = len((process / "maps").read_text().splitlines())
        return cls(len(list((process / "fd").iterdir())), int(status["Threads"]), mappings, memory)


def one_round(client: Client, device: str, other: str, folder: Path, number: int) -> None:
    """Two snapshots in one storage, first overwrites, reads of both images, and their end."""
    first = client.create_snapshot([device], storage=[str(folder)], limit=2 * SIZE)
    second = client.create_snapshot([device], storage=[f"@{first.id}"])
    write_at(device, number % (SIZE // MIB) * MIB, number.to_bytes(8, "little") * (MIB // 16))
    for snapshot in (first, second):
        read_at(snapshot.images[0].image, 0, MIB)
    client.changes(device, since=first.images[0].cursor, until=second.id)
    client.destroy_snapshots([first.id, second.id])
    if number % OTHER_DEVICE == 0:
        client.detach(client.attach(other).device)


def test_rounds_of_snapshots_leave_nothing(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    with loop_device(folder / "disk", SIZE) as origin, loop_device(folder / "other", SIZE) as other:
        device = client.attach(origin).device
        try:
            wait_until("all stand by", lambda: set(daemon.processes().processes) == set(EVERYBODY))
            seen = {}
            for number in range(WARM + ROUNDS):
                one_round(client, device, other, folder, number)
                if number + 1 == WARM or (number + 1 - WARM) % 100 == 0:
                    seen[number + 1] = {role: Used.of(daemon.pid(role)) for role in EVERYBODY}
                    print(number + 1, seen[number + 1], flush=True)
                if number + 1 == WARM:
                    state, nodes = daemon.state(), ublk_nodes()
            before, after = seen[WARM], {role: Used.of(daemon.pid(role)) for role in EVERYBODY}
            print(f"after {ROUNDS} rounds: {after}")
            assert (daemon.state(), ublk_nodes()) == (state, nodes)
            for role in EVERYBODY:
                assert after[role].descriptors == before[role].descriptors, role
                assert after[role].threads <= before[role].threads, role
                assert after[role].mappings <= before[role].mappings + 8, role
                assert after[role].memory <= before[role].memory + SLACK[role], role
        finally:
            client.detach(device, force=True)
