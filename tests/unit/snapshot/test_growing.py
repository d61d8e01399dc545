# SPDX-License-Identifier: MIT
"""A file of a storage is made longer: the catalogue knows it before, and limits hold whatever happens meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot import cutting_back, enlarging, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, Catalogue, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.filling import growing
from blksnap_ublk.snapshot.keyed_locks import KeyedLocks
from blksnap_ublk.snapshot.storage import DescriptorRegistry

MIB = 1 << 20


class World:
    """A storage in one file of 1 MiB that grows up to 16 MiB. `meanwhile` is called while it is made longer."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = directory / "file"
        self.path.write_bytes(b"s" * MIB)
        status = os.stat(self.path)
        number = DeviceNumber.of(status.st_dev)
        area = AreaEntry(
            str(self.path),
            "name",
            (number.major, number.minor),
            status.st_ino,
            0,
            MIB,
            former_size=MIB,
            grows=True,
            longest=MIB,
        )
        self.meanwhile: Callable[[], None] = lambda: None
        catalogue, registry = Catalogue(directory / "catalogue"), DescriptorRegistry()
        catalogue.put_storage(StorageEntry("key", 4096, 16 * MIB, "break", [area]))
        registry.acquire(storages.identity(area), lambda: os.open(self.path, os.O_RDWR | os.O_CLOEXEC))
        made = SimpleNamespace(
            catalogue=catalogue,
            registry=registry,
            storage_locks=KeyedLocks(),
            open_storages={"key"},
            growing=SimpleNamespace(extending=self._extending),
            state=SimpleNamespace(storage_state=lambda name: None),
        )
        self.context = cast("Context", made)
        monkeypatch.setattr(enlarging, "append", self._append)

    @property
    def storage(self) -> StorageEntry:
        found = self.context.catalogue.storage("key")
        assert found is not None
        return found

    def change(self, **what: object) -> None:
        self.context.catalogue.put_storage(msgspec.structs.replace(self.storage, **what))

    @contextmanager
    def _extending(self) -> Iterator[None]:
        yield
        self.meanwhile()

    def _append(self, context: Context, storage: StorageEntry, area: AreaEntry, descriptor: int) -> None:
        context.catalogue.put_storage(msgspec.structs.replace(storage, areas=[*storage.areas, area]))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    for identity in made.context.registry.held():
        made.context.registry.release(identity)


def test_the_file_is_cut_back_whenever_the_process_dies(world: World) -> None:
    seen: list[StorageEntry] = []
    world.meanwhile = lambda: seen.append(world.storage)
    assert growing.grow(world.context, "key", 4 * MIB) == 4 * MIB
    assert world.path.stat().st_size == 5 * MIB
    for storage in (*seen, world.storage):
        os.truncate(world.path, 5 * MIB)
        assert cutting_back.restore(storage.areas) == []
        assert world.path.stat().st_size == MIB


def test_what_is_written_beyond_it_stays(world: World) -> None:
    assert growing.grow(world.context, "key", 4 * MIB) == 4 * MIB
    os.truncate(world.path, 5 * MIB + 1)
    assert len(cutting_back.restore(world.storage.areas)) == 1
    assert world.path.stat().st_size == 5 * MIB + 1


def test_a_limit_that_became_smaller_meanwhile_holds(world: World) -> None:
    world.meanwhile = lambda: world.change(limit=3 * MIB)
    assert growing.grow(world.context, "key", 4 * MIB) == 2 * MIB
    assert world.storage.capacity == 3 * MIB
    assert world.path.stat().st_size == 3 * MIB
    world.meanwhile = lambda: None
    assert growing.grow(world.context, "key", 4 * MIB) == 0
    world.change(limit=8 * MIB)
    world.meanwhile = lambda: world.change(limit=1)
    assert growing.grow(world.context, "key", 4 * MIB) == 0
    assert world.storage.capacity == 3 * MIB
    assert world.path.stat().st_size == 3 * MIB
    assert {area.longest for area in world.storage.areas} == {3 * MIB}


def test_a_storage_that_was_released_meanwhile_is_as_before(world: World) -> None:
    world.meanwhile = lambda: world.change(released=True)
    assert growing.grow(world.context, "key", 4 * MIB) == 0
    assert world.path.stat().st_size == MIB
    assert growing.grow(world.context, "key", 4 * MIB) == 0
    world.change(released=False)
    world.meanwhile = lambda: world.context.catalogue.remove_storage("key")
    assert growing.grow(world.context, "key", 4 * MIB) == 0
    assert world.path.stat().st_size == MIB
