# SPDX-License-Identifier: MIT
"""Difference storage that gets full, at any point and with any policy: which snapshots are lost, and that the others,
the origin and its writers are not."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.errors import Failed
from demo import blocks
from tests.direct_io import errno_of_read, read_at, write_at
from tests.filtered import Filtered, filtered, granted_ways
from tests.fio_load import fio_load
from tests.loop_devices import loop_device
from tests.lost_storage import MIB, UNIT, lost_storage, storage_state
from tests.own_daemon import OwnDaemon, wait_until
from tests.seeds import dice

SIZE = 4 * MIB
ONE_WAY = granted_ways()[-1]


def storage_file(folder: Path, name: str, size: int) -> str:
    """A file of `size` bytes, as the SPEC of storage that does not grow."""
    (folder / name).write_bytes(bytes(size))
    return f"{folder / name}:0+{size // 512}"


# Break


@dataclass
class Held:
    """A snapshot, what the device held at its instant, and the units that have been overwritten since."""

    snapshot: forms.Snapshot
    storage: str
    content: bytes
    overwritten: set[int]
    active: bool = True


class Overflows:
    """Snapshots in two storages that are too small, and writes one after the other: after each, what must hold."""

    def __init__(self, client: Client, disk: Filtered, random: Random, specs: dict[str, str]) -> None:
        self.client = client
        self.disk = disk
        self.random = random
        self.specs = specs
        self.held: list[Held] = []
        self.content = bytearray(random.randbytes(SIZE))
        self.lost = 0
        write_at(disk.path, 0, bytes(self.content))

    def take(self) -> None:
        """A storage is shared by naming a snapshot in it that can be trusted; where there is none it must be left."""
        name = self.random.choice(list(self.specs))
        users = [each for each in self.held if each.storage == name]
        shared = next((f"@{each.snapshot.id}" for each in users if each.active), self.specs[name])
        if shared == self.specs[name]:
            for each in users:
                self.disk.destroy(each.snapshot)
                self.held.remove(each)
        snapshot = self.client.create_snapshot([self.disk.path], storage=[shared])
        self.held.append(Held(snapshot, name, bytes(self.content), set()))

    def destroy(self) -> None:
        if self.held:
            going = self.held.pop(self.random.randrange(len(self.held)))
            self.disk.destroy(going.snapshot)

    def write(self) -> None:
        """One write. What is lost lacks units of it that had no room, and so does everything that lacks the same."""
        length = 512 * self.random.choice([1, 8, 8, 8, self.random.randrange(1, 256)])
        start = 512 * self.random.randrange((SIZE - length) // 512 + 1)
        data = self.random.randbytes(length)
        units = set(range(start // UNIT, (start + length - 1) // UNIT + 1))
        room = {each.storage: self._room(each) for each in self.held}
        write_at(self.disk.path, start, data)
        self.content[start : start + length] = data
        shown = {each.id: each for each in self.client.list_snapshots()}
        for name, free in room.items():
            here = [each for each in self.held if each.storage == name and each.active]
            lost = [each for each in here if shown[each.snapshot.id].state.value != "active"]
            lacking = [each for each in here if not units <= each.overwritten]
            if not lost:
                continue
            newest = max(lacking, key=self.held.index)
            needed = len(units - newest.overwritten)
            assert all(each in lacking for each in lost), "a snapshot is lost that lacks nothing"
            assert newest in lost, "the newest snapshot that lacks something is not lost"
            assert free < needed, f"lost with room for {free} units, and {needed} to preserve"
            if len(units) == 1:
                assert lost == lacking, "not all that lack the unit are lost"
            for each in lost:
                state = shown[each.snapshot.id]
                assert (state.state.value, "full" in str(state.error)) == ("overflown", True)
                each.active = False
                self.lost += 1
        for each in self.held:
            each.overwritten |= units

    def check(self) -> None:
        """Each image is right, or gives nothing but EIO; the device has what was written."""
        assert read_at(self.disk.path, 0, SIZE) == self.content
        for each in self.held:
            image = each.snapshot.images[0].image
            assert (self.disk.state_of(each.snapshot) == "active") is each.active
            if each.active:
                assert read_at(image, 0, SIZE) == each.content
            else:
                assert errno_of_read(image, UNIT * self.random.randrange(SIZE // UNIT), UNIT) == errno.EIO

    def _room(self, held: Held) -> int:
        storage = self.client.show_snapshot(held.snapshot.id).storage
        return (storage.capacity - storage.used) // UNIT


@pytest.mark.parametrize("run", range(2))
def test_what_is_lost_and_what_is_not(daemon: OwnDaemon, client: Client, folder: Path, way: str, run: int) -> None:
    """Snapshots come and go in two small storages, at random points."""
    random = dice()
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        specs = {name: storage_file(folder, name, UNIT * random.randrange(8, 400)) for name in ("a", "b")}
        story = Overflows(client, disk, random, specs)
        before = storage_state(daemon)
        while story.lost < 5:
            for action, times in [(story.take, 2), (story.write, random.randrange(40)), (story.destroy, 1)]:
                for _ in range(times if len(story.held) < 8 or action != story.take else 0):
                    action()
            story.check()
        while story.held:
            story.destroy()
            story.check()
        assert storage_state(daemon) == before


def test_storages_overflow_one_after_the_other_under_fio(client: Client, folder: Path, way: str) -> None:
    """Three snapshots in one storage and two in another, taken while fio writes: an image that can be read is always
    the same; those in a storage with room enough stay."""
    random = dice()
    with loop_device(folder / "origin", 2 * SIZE) as origin, filtered(client, origin, way, folder) as disk:
        for start in range(0, disk.size, MIB):
            write_at(disk.path, start, os.urandom(MIB))
        small = storage_file(folder, "small", UNIT * random.randrange(64, SIZE // UNIT))
        large = storage_file(folder, "large", 3 * disk.size)
        hashes: dict[str, str | None] = {}
        taken: dict[str, list[forms.Snapshot]] = {small: [], large: []}
        with fio_load(disk.path, size=f"{SIZE}") as load:
            for spec in (small, large, small, large, small):
                active = [each for each in taken[spec] if disk.state_of(each) == "active"]
                if taken[spec] and not active:
                    continue  # a storage is shared by naming a snapshot in it that can be trusted
                share = f"@{active[0].id}" if active else spec
                try:
                    snapshot = client.create_snapshot([disk.path], storage=[share])
                except Failed as error:
                    if "overflown" not in str(error):
                        raise
                    continue
                taken[spec].append(snapshot)
                hashes[snapshot.id] = hash_or_none(snapshot, disk.size)
                load.wait_for_round()
            load.wait_for_round()
        for snapshot in taken[large]:
            assert disk.state_of(snapshot) == "active"
            assert hash_or_none(snapshot, disk.size) == hashes[snapshot.id] is not None
        for snapshot in taken[small]:
            if disk.state_of(snapshot) == "active":
                assert hash_or_none(snapshot, disk.size) == hashes[snapshot.id] is not None
            else:
                assert hash_or_none(snapshot, disk.size) is None
        everyone = [*taken[small], *taken[large]]
        random.shuffle(everyone)
        for snapshot in everyone:
            disk.destroy(snapshot)


def hash_or_none(snapshot: forms.Snapshot, size: int) -> str | None:
    """Of the image; None when it gives EIO."""
    try:
        return blocks.sha256(snapshot.images[0].image, size)
    except OSError as error:
        if error.errno == errno.EIO:
            return None
        raise


# Pause


def test_a_pause_in_which_room_comes_loses_nothing(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    """Twice: with an area that is added, and then with another."""
    storage = storage_file(folder, "first", MIB)
    with lost_storage(daemon, client, folder, way, storage, on_overflow="pause:100", rate="6m") as story:
        for number, size in enumerate([6 * MIB, 40 * MIB], start=1):
            wait_until("writers wait for room", lambda n=number: len(story.events("storage-waiting")) == n)  # type: ignore[misc]
            assert story.disk.state_of(story.suspect) == "active"
            client.add_storage(story.suspect.id, [storage_file(folder, f"more{number}", size)])
            wait_until("they go on", lambda n=number: len(story.events("storage-resumed")) == n)  # type: ignore[misc]
        story.load.wait_for_round()
        story.overwrite()
        story.expect_active()
        shown = client.show_storage(story.suspect.id)
        assert shown.capacity == 47 * MIB
        assert shown.used > 7 * MIB


def test_a_pause_in_which_none_comes_ends_with_the_snapshot(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    storage = storage_file(folder, "storage", MIB)
    with lost_storage(daemon, client, folder, way, storage, on_overflow="pause:3") as story:
        waiting = story.wait_for_event("storage-waiting")
        story.wait_until_lost()
        story.expect_lost("overflown", "full")
        (overflow,) = story.events("overflow")
        assert overflow.seq > waiting.seq
        # Nobody waits any more.
        story.overwrite()
        assert len(story.events("storage-waiting")) == 1


def test_room_that_another_snapshot_leaves_ends_the_pause(
    daemon: OwnDaemon, client: Client, folder: Path, way: str
) -> None:
    """The older of two that share the storage is destroyed while a writer waits."""
    storage = storage_file(folder, "storage", MIB)
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        write_at(disk.path, 0, os.urandom(SIZE))
        older = client.create_snapshot([disk.path], storage=[storage], on_overflow="pause:100")
        write_at(disk.path, 0, os.urandom(MIB))
        copy = disk.copy()
        newer = client.create_snapshot([disk.path], storage=[f"@{older.id}"])
        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(write_at, disk.path, 2 * MIB, os.urandom(MIB))
            wait_until("it waits", lambda: "storage-waiting" in _types(client, newer))
            disk.destroy(older)
            writer.result(60)
        assert disk.state_of(newer) == "active"
        disk.expect_equal(newer.images[0].image, copy)


def _types(client: Client, snapshot: forms.Snapshot) -> list[str]:
    return [event.type for event in client.events(snapshot=snapshot.id)]


# Evict the oldest


def test_older_snapshots_go_first(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    """Snapshots after each round of fio, in a storage with room for two of them or so: the last one always stays."""
    storage = storage_file(folder, "storage", 2 * SIZE + MIB)
    before = storage_state(daemon)
    with loop_device(folder / "origin", 2 * SIZE) as origin, filtered(client, origin, way, folder) as disk:
        write_at(disk.path, 0, os.urandom(SIZE))
        hashes: dict[str, str | None] = {}
        taken: list[forms.Snapshot] = []
        with fio_load(disk.path, size=f"{SIZE}") as load:
            for _ in range(6):
                share = [f"@{taken[-1].id}"] if taken else [storage]
                policy = None if taken else "evict-oldest"
                snapshot = client.create_snapshot([disk.path], storage=share, on_overflow=policy)
                taken.append(snapshot)
                hashes[snapshot.id] = hash_or_none(snapshot, disk.size)
                load.wait_for_round()
        held = client.list_snapshots()
        ids = [snapshot.id for snapshot in taken]
        assert [each.id for each in held] == ids[-len(held) :], "not the oldest ones went"
        assert 0 < len(held) < len(taken)
        for each in held:
            assert each.state.value == "active"
            assert hash_or_none(each, disk.size) == hashes[each.id] is not None
        for gone in ids[: -len(held)]:
            kinds = [event.type for event in client.events(snapshot=gone)]
            assert "overflow" not in kinds
            assert kinds.index("evicted") < kinds.index("destroyed")
    assert storage_state(daemon) == before


def test_the_last_snapshot_is_not_evicted_but_lost(daemon: OwnDaemon, client: Client, folder: Path, way: str) -> None:
    storage = storage_file(folder, "storage", MIB)
    with lost_storage(daemon, client, folder, way, storage, on_overflow="evict-oldest") as story:
        story.wait_until_lost()
        story.expect_lost("overflown", "full")
        assert story.events("evicted") == []


def test_only_snapshots_of_the_same_storage_are_evicted(client: Client, folder: Path, way: str) -> None:
    """Others of the device, older ones too, stay; so does what another device has in the same storage, if younger."""
    with ExitStack() as stack:
        disks = []
        for name in ("first", "second"):
            origin = stack.enter_context(loop_device(folder / name, SIZE))
            disks.append(stack.enter_context(filtered(client, origin, way, folder)))
            write_at(disks[-1].path, 0, os.urandom(SIZE))
        elsewhere = disks[0].snapshot(folder)
        storage = storage_file(folder, "storage", MIB)
        copies = [disk.copy(f"copy{n}") for n, disk in enumerate(disks)]
        oldest = client.create_snapshot([disks[0].path], storage=[storage], on_overflow="evict-oldest")
        youngest = client.create_snapshot([disks[1].path], storage=[f"@{oldest.id}"])
        write_at(disks[0].path, 0, os.urandom(MIB // 2))
        for n in range(4):
            write_at(disks[1].path, n * 52 * UNIT, os.urandom(52 * UNIT))
        wait_until("one goes", lambda: len(client.list_snapshots()) == 2)
        assert [each.id for each in client.list_snapshots()] == [elsewhere.id, youngest.id]
        disks[0].expect_equal(elsewhere.images[0].image, copies[0])
        disks[1].expect_equal(youngest.images[0].image, copies[1])


# Room that is added


@pytest.mark.parametrize("number", [1, 5])
def test_areas_of_all_kinds_are_added_under_load(
    daemon: OwnDaemon, client: Client, folder: Path, way: str, number: int
) -> None:
    """Files, ranges and devices, while fio fills what there is; before a warning and after it."""
    first = storage_file(folder, "first", 2 * MIB)
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(folder / "device", 4 * MIB))
        story = stack.enter_context(
            lost_storage(daemon, client, folder, way, first, on_overflow="pause:100", rate="6m")
        )
        kinds: list[Callable[[int], str]] = [
            lambda n: storage_file(folder, f"file{n}", 6 * MIB),
            lambda n: f"{device}:{n * 1024}+{1024}",
            lambda n: storage_file(folder, f"small{n}", UNIT * (n + 1)),
        ]
        for n, kind in itertools.product(range(number), kinds):
            client.add_storage(story.suspect.id, [kind(n)])
        client.add_storage(story.suspect.id, [storage_file(folder, "last", 24 * MIB)])
        story.load.wait_for_round()
        story.expect_active()
        storage = client.show_storage(story.suspect.id)
        assert storage.capacity == sum(area.count * 512 for area in storage.areas)
        assert storage.used == sum(area.used for area in storage.areas) > 2 * MIB
