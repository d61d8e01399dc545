# SPDX-License-Identifier: MIT
"""Many snapshots, one after the other and at the same time; with BSU_SOAK_SECONDS set as many as are promised."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from demo import blocks
from tests.a_then_b import CountingWriters, expect_one_instant, numbers
from tests.direct_io import write_at
from tests.filtered import Filtered, filtered
from tests.loop_devices import loop_device

MIB = 1 << 20
SOAK = "BSU_SOAK_SECONDS" in os.environ
TAKES = 1000 if SOAK else 40
KEPT = 3
WRITERS = 4
HELD = 50 if SOAK else 16
SIZE = 4 * MIB


@pytest.fixture
def generator() -> random.Random:
    """Its seed is printed, so that a failure shows it."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@contextmanager
def several(client: Client, folder: Path, way: str, names: str) -> Iterator[list[Filtered]]:
    """Filtered devices, one for each letter, with random contents."""
    with ExitStack() as stack:
        devices = []
        for name in names:
            own = folder / name
            own.mkdir()
            origin = stack.enter_context(loop_device(own / "disk", SIZE))
            for start in range(0, SIZE, MIB):
                write_at(origin, start, os.urandom(MIB))
            devices.append(stack.enter_context(filtered(client, origin, way, own)))
        yield devices


@contextmanager
def second_half_written(paths: list[str]) -> Iterator[None]:
    """fio writes to the second half of each device, as much as leaves the others some of the processor."""
    common = ["--ioengine=libaio", "--iodepth=4", "--direct=1", "--rw=randwrite", "--bsrange=4k-64k", "--rate_iops=200"]
    place = [f"--offset={SIZE // 2}", f"--size={SIZE // 2}", "--time_based", "--runtime=1d", "--allow_file_create=0"]
    jobs = [option for n, path in enumerate(paths) for option in (f"--name=load{n}", f"--filename={path}")]
    # Options before the first name are for all.
    process = subprocess.Popen(
        ["fio", "--minimal", *common, *place, *jobs], cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield
        assert process.poll() is None, process.communicate()
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


@dataclass
class Seen:
    """A held snapshot, and what its images were at first."""

    snapshot: forms.Snapshot
    numbers: list[list[int]]
    hashes: list[str]

    @classmethod
    def of(cls, snapshot: forms.Snapshot) -> Seen:
        images = [image.image for image in snapshot.images]
        return cls(
            snapshot, [numbers(image, WRITERS) for image in images], [blocks.sha256(image, SIZE) for image in images]
        )


def test_b_is_never_ahead_of_a(client: Client, folder: Path, way: str, generator: random.Random) -> None:
    """Snapshots overlap, end in any order, have storage of their own or share it."""
    with several(client, folder, way, "ab") as devices, ExitStack() as load:
        paths = [device.path for device in devices]
        writers = load.enter_context(CountingWriters(paths, WRITERS, folder))
        load.enter_context(second_half_written(paths))
        held: list[Seen] = []
        gates = []

        def end_one() -> None:
            going = held.pop(generator.randrange(len(held)))
            assert Seen.of(going.snapshot) == going
            client.destroy_snapshots([going.snapshot.id])

        for _ in range(TAKES):
            ended = writers.ended()
            shared = bool(held) and generator.random() < 0.5
            snapshot = client.create_snapshot(
                paths,
                storage=[f"@{generator.choice(held).snapshot.id}" if shared else str(folder)],
                limit=None if shared else (KEPT + 1) * len(paths) * SIZE + MIB,
            )
            started = writers.started()
            seen = Seen.of(snapshot)
            expect_one_instant(seen.numbers, ended, started)
            gates.append(snapshot.gate_us)
            held.append(seen)
            if len(held) > KEPT:
                end_one()
            writers.check()
        while held:
            end_one()
        load.close()
        last = writers_last(paths)
        assert last[0] == last[1]
        gates.sort()
        print(
            f"{way}: {TAKES} snapshots, {sum(last[0])} numbers, gate: median {statistics.median(gates):.0f} µs, "
            f"99 % {gates[len(gates) * 99 // 100]} µs, most {gates[-1]} µs"
        )


def writers_last(paths: list[str]) -> list[list[int]]:
    return [numbers(path, WRITERS) for path in paths]


def test_many_are_held_at_once(client: Client, folder: Path, way: str, generator: random.Random) -> None:
    """All in one storage. The first half of the device is written to between takes, and known; the second always."""
    with several(client, folder, way, "a") as (device,):
        half = SIZE // 2
        known: dict[str, tuple[str, str]] = {}
        held: list[forms.Snapshot] = []
        may_write = threading.Lock()
        stop = threading.Event()
        failures: list[OSError] = []

        def write() -> None:
            dice = random.Random(generator.random())
            try:
                while not stop.is_set():
                    length = dice.randrange(1, 9) * 4096
                    start = dice.randrange((half - length) // 4096 + 1) * 4096
                    with may_write:
                        write_at(device.path, start, os.urandom(length))
            except OSError as error:
                failures.append(error)

        def expect_right(snapshot: forms.Snapshot) -> None:
            image = snapshot.images[0].image
            assert (blocks.sha256(image, half), blocks.sha256(image, SIZE)) == known[snapshot.id]

        writer = threading.Thread(target=write)
        writer.start()
        try:
            with second_half_written([device.path]):
                for _ in range(HELD):
                    with may_write:
                        content = blocks.sha256(device.path, half)
                        storage = f"@{generator.choice(held).id}" if held else str(folder)
                        snapshot = client.create_snapshot(
                            [device.path], storage=[storage], limit=None if held else (HELD + 2) * SIZE
                        )
                    known[snapshot.id] = content, blocks.sha256(snapshot.images[0].image, SIZE)
                    held.append(snapshot)
                for snapshot in held:
                    expect_right(snapshot)
                print(f"{way}: {len(held)} held in {client.show_snapshot(held[0].id).storage.used >> 10} KiB")
                while held:
                    at = generator.randrange(len(held))
                    client.destroy_snapshots([held.pop(at).id])
                    # Its neighbours get what it alone had.
                    for snapshot in held if len(held) % 10 == 0 else held[max(0, at - 2) : at + 1]:
                        expect_right(snapshot)
        finally:
            stop.set()
            writer.join()
        assert not failures
