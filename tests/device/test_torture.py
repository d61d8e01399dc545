# SPDX-License-Identifier: MIT
"""kill -9 of any of our processes, every few seconds, whatever is under way: users see pauses, and nothing else.

BSU_TORTURE_ROUNDS is the number of deaths; 200 take a quarter of an hour.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError
from demo import blocks
from tests.a_then_b import CountingWriters, expect_one_instant, numbers
from tests.fio_load import fio_load
from tests.killing import EVERYBODY, answers, kill, start_where_nobody_lives
from tests.loop_devices import loop_device
from tests.own_daemon import OwnDaemon, own_daemon, wait_until
from tests.seeds import dice

MIB = 1 << 20
SIZE = 32 * MIB
ROUNDS = int(os.environ.get("BSU_TORTURE_ROUNDS", "6"))
PAUSE = (1.0, 5.0)  # seconds between two deaths
WRITERS = 2
VICTIMS = [
    *[("io",)] * 4,
    ("control",),
    ("keeper",),
    ("io", "control"),
    ("io", "io-spare"),
    ("io", "keeper"),
    ("keeper", "control"),
    EVERYBODY,
]


class Work:
    """A thread of its own: snapshots are taken, grow, are looked at and destroyed, as long as its `with` lasts."""

    def __init__(
        self, daemon: OwnDaemon, devices: list[str], writers: CountingWriters, folder: Path, join: str
    ) -> None:
        self.taken = 0
        self._daemon = daemon
        self._devices = devices
        self._writers = writers
        self._folder = folder
        self._join = join
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def check(self) -> None:
        """Fails if anything was found wrong."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Work:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        turn = 0
        while not self._stop.is_set() and self._failure is None:
            turn += 1
            try:
                self._one(joins=turn % 2 == 0)
            except BlksnapError:
                time.sleep(0.1)  # a process has died meanwhile
            except BaseException as error:
                self._failure = error

    def _one(self, *, joins: bool) -> None:
        where = f"@{self._join}" if joins else str(self._folder)
        limit = None if joins else 2 * SIZE
        with self._daemon.client() as client:
            before = self._writers.ended()
            snapshot = client.create_snapshot(self._devices, storage=[where], limit=limit)
            self.taken += 1
            started = self._writers.started()
            try:
                found = [numbers(image.image, WRITERS) for image in snapshot.images]
            except OSError:
                with self._daemon.client() as again:
                    assert not again.check_snapshot(snapshot.id).trusted, "an image that is whole cannot be read"
            else:
                expect_one_instant(found, before, started)
            client.destroy_snapshots([snapshot.id])


class Readers:
    """Threads that compare images with their hashes again and again."""

    def __init__(self, images: dict[str, str]) -> None:
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._run, args=each) for each in images.items()]

    def check(self) -> None:
        """Fails if an image could not be read, or was not as before."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, image: str, digest: str) -> None:
        try:
            while not self._stop.is_set():
                assert blocks.sha256(image, SIZE) == digest, f"{image} has changed"
                self._stop.wait(0.2)
        except BaseException as error:
            self._failure = error


def named_storage(folder: Path, name: str, size: int) -> str:
    path = folder / name
    path.write_bytes(bytes(size))
    return str(path)


def held(client: Client, devices: list[str], folder: Path) -> Iterator[forms.Snapshot]:
    """Four snapshots: two that share a storage, one of each device alone."""
    first = client.create_snapshot(devices, storage=[named_storage(folder, "shared", 6 * SIZE)])
    yield first
    yield client.create_snapshot([devices[0]], storage=[named_storage(folder, "own", 2 * SIZE)])
    yield client.create_snapshot(devices, storage=[f"@{first.id}"])
    yield client.create_snapshot([devices[1]], storage=[f"@{first.id}"])


def test_deaths_at_any_moment(folder: Path) -> None:
    chance = dice()
    with ExitStack() as stack:
        daemon = stack.enter_context(own_daemon())
        origins = [stack.enter_context(loop_device(folder / name, SIZE)) for name in ("first", "second")]
        with daemon.client() as client:
            devices = [client.attach(origin).device for origin in origins]
            stack.callback(lambda: detach_all(daemon))
            writers = stack.enter_context(CountingWriters(devices, WRITERS, folder))
            snapshots = list(held(client, devices, folder))
        images = [image for each in snapshots for image in each.images]
        hashes = {image.image: blocks.sha256(image.image, SIZE) for image in images}
        copy = folder / "copy"
        blocks.full_copy(snapshots[0].images[0].image, SIZE, copy)
        loads = [stack.enter_context(fio_load(each, "--offset=1m", size="8m")) for each in devices]
        readers = stack.enter_context(Readers(dict(list(hashes.items())[:3])))
        work = stack.enter_context(Work(daemon, devices, writers, folder, snapshots[0].id))
        checks = [*(load.check for load in loads), writers.check, readers.check, work.check]
        for number in range(ROUNDS):
            time.sleep(chance.uniform(*PAUSE))
            victims = chance.choice(VICTIMS)
            print(f"death {number}: {', '.join(victims)}", flush=True)
            kill(daemon, *victims)
            start_where_nobody_lives(daemon)
            try:
                for check in checks:
                    check()
            except BaseException:
                print(daemon.log(), flush=True)
                raise
        wait_until("the daemon answers", lambda: answers(daemon))
        for load in loads:
            load.wait_for_round()
        work.__exit__()
        work.check()
        with daemon.client() as client:
            for snapshot in snapshots:
                shown = client.show_snapshot(snapshot.id)
                assert shown.state.value == "active", f"{shown.error}\n{daemon.log()}"
            for image, digest in hashes.items():
                assert blocks.sha256(image, SIZE) == digest, f"{image} has changed\n{daemon.log()}"
            last = client.create_snapshot(devices, storage=[str(folder)], limit=2 * SIZE)
            changes = client.changes(devices[0], since=snapshots[0].images[0].cursor, until=last.id)
            assert not changes.all, changes.reason
            ranges = [(int(start), int(length)) for start, length in changes.ranges]
            blocks.apply(last.images[0].image, ranges, copy)
            assert blocks.first_difference(last.images[0].image, SIZE, copy) is None, "a change was missed"


def detach_all(daemon: OwnDaemon) -> None:
    wait_until("the daemon answers", lambda: answers(daemon))
    with daemon.client() as client:
        client.destroy_snapshots([each.id for each in client.list_snapshots()], force=True)
        for device in client.list_devices():
            client.detach(device.device, force=True)
