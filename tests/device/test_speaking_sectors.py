# SPDX-License-Identifier: MIT
"""Filtered devices, written to all the time: each snapshot shows one instant of its members, and goes on to."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from tests.direct_io import read_at
from tests.filtered import filtered
from tests.loop_devices import loop_device
from tests.speaking.checker import Instant, complaints, now
from tests.speaking.sectors import SECTOR
from tests.speaking.writers import Writers

SIZE = 1 << 20
MEMBERS = ("one",)
"""A disk for each, all in one snapshot."""
WRITERS = 4
TAKES = 4
HELD = 0
"""Snapshots that stay while further ones are taken."""


@contextmanager
def opened(paths: list[str]) -> Iterator[list[int]]:
    """Descriptors for direct writes."""
    with ExitStack() as stack:
        descriptors = []
        for path in paths:
            descriptors.append(os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC))
            stack.callback(os.close, descriptors[-1])
        yield descriptors


def contents(snapshot: forms.Snapshot, devices: list[str]) -> list[bytes]:
    """What the images of the devices hold."""
    images = {image.device: image.image for image in snapshot.images}
    return [read_at(images[device], 0, SIZE) for device in devices]


def test_every_snapshot_shows_one_instant(client: Client, folder: Path, way: str) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    with ExitStack() as stack:
        devices = []
        for name in MEMBERS:
            origin = stack.enter_context(loop_device(folder / name, SIZE))
            devices.append(stack.enter_context(filtered(client, origin, way, folder)).path)
        storage = folder / "storage"
        with storage.open("wb") as file:
            file.truncate(64 << 20)
        descriptors = stack.enter_context(opened(devices))

        def write(device: int, start: int, data: memoryview) -> None:
            done = os.pwritev(descriptors[device], [data], start)
            assert done == len(data), f"{done} of {len(data)} bytes at {start}"

        writers = Writers(WRITERS, [SIZE // SECTOR] * len(MEMBERS), write, seed)
        held: list[tuple[forms.Snapshot, list[bytes]]] = []
        with writers:
            for _ in range(TAKES):
                began = time.monotonic_ns()
                snapshot = client.create_snapshot(devices, storage=[str(storage)])
                instant = Instant(began, time.monotonic_ns())
                held.append((snapshot, contents(snapshot, devices)))
                wrong = complaints(instant, held[-1][1], writers.writers)
                assert not wrong, wrong[:10]
                if len(held) > HELD:
                    oldest, first_seen = held.pop(0)
                    assert contents(oldest, devices) == first_seen
                    client.destroy_snapshots([oldest.id])
        for snapshot, first_seen in held:
            assert contents(snapshot, devices) == first_seen
            client.destroy_snapshots([snapshot.id])
        wrong = complaints(now(), [read_at(device, 0, SIZE) for device in devices], writers.writers)
        assert not wrong, wrong[:10]
        print(f"{TAKES} snapshots, {writers.count} writes")
