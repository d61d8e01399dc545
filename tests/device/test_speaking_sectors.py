# SPDX-License-Identifier: MIT
"""Filtered devices, written to all the time: each snapshot shows one instant of its members, and goes on to, whatever
other snapshots come, go and are written to meanwhile."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from tests.direct_io import read_at, write_at
from tests.filtered import filtered
from tests.loop_devices import loop_device
from tests.speaking.checker import Instant, complaints, now
from tests.speaking.sectors import SECTOR
from tests.speaking.writers import Writers

SIZE = 1 << 20
MEMBERS = ("one", "two", "three")
"""A disk for each, all in one snapshot."""
WRITERS = 4
TAKES = 6
HELD = 2
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


def images_of(snapshot: forms.Snapshot, devices: list[str]) -> list[str]:
    """The images, in the order of the devices."""
    images = {image.device: image.image for image in snapshot.images}
    return [images[device] for device in devices]


def contents(snapshot: forms.Snapshot, devices: list[str]) -> list[bytes]:
    """What the images of the devices hold."""
    return [read_at(image, 0, SIZE) for image in images_of(snapshot, devices)]


class Scribbler:
    """Writes noise to the images of a snapshot inside of its `with`; then they must hold that, and what was there."""

    def __init__(self, snapshot: forms.Snapshot, devices: list[str], seed: int) -> None:
        self._images = images_of(snapshot, devices)
        self._models = [bytearray(content) for content in contents(snapshot, devices)]
        self._dice = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failure: OSError | None = None

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.005):
                at = self._dice.randrange(len(self._images))
                length = self._dice.choice([1, 3, 8, 8, 40]) * SECTOR
                start = self._dice.randrange((SIZE - length) // SECTOR) * SECTOR
                data = self._dice.randbytes(length)
                write_at(self._images[at], start, data)
                self._models[at][start : start + length] = data
        except OSError as error:
            self._failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            assert self._failure is None, self._failure
            assert [read_at(image, 0, SIZE) for image in self._images] == self._models


def test_every_snapshot_shows_one_instant(client: Client, folder: Path, way: str) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    with ExitStack() as stack:
        devices = []
        for name in MEMBERS:
            origin = stack.enter_context(loop_device(folder / name, SIZE))
            devices.append(stack.enter_context(filtered(client, origin, way, folder)).path)
        descriptors = stack.enter_context(opened(devices))

        def write(device: int, start: int, data: memoryview) -> None:
            done = os.pwritev(descriptors[device], [data], start)
            assert done == len(data), f"{done} of {len(data)} bytes at {start}"

        writers = Writers(WRITERS, [SIZE // SECTOR] * len(MEMBERS), write, seed)
        held: list[tuple[forms.Snapshot, list[bytes]]] = []

        def take() -> forms.Snapshot:
            if held and dice.random() < 0.5:
                return client.create_snapshot(devices, storage=[f"@{dice.choice(held)[0].id}"])
            return client.create_snapshot(devices, storage=[str(folder)], limit=32 << 20)

        def end_one() -> None:
            snapshot, first_seen = held.pop(dice.randrange(len(held)))
            assert contents(snapshot, devices) == first_seen
            client.destroy_snapshots([snapshot.id])

        with writers:
            written = take()
            with Scribbler(written, devices, seed):
                for _ in range(TAKES):
                    began = time.monotonic_ns()
                    snapshot = take()
                    instant = Instant(began, time.monotonic_ns())
                    held.append((snapshot, contents(snapshot, devices)))
                    wrong = complaints(instant, held[-1][1], writers.writers)
                    assert not wrong, wrong[:10]
                    if len(held) > HELD:
                        end_one()
            client.destroy_snapshots([written.id])
        while held:
            end_one()
        wrong = complaints(now(), [read_at(device, 0, SIZE) for device in devices], writers.writers)
        assert not wrong, wrong[:10]
        print(f"{TAKES} snapshots, {writers.count} writes")
