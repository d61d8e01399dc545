# SPDX-License-Identifier: MIT
"""What storage beneath a filtered device means for the images of that device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from blksnap_ublk.errors import Busy, Unsupported
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.ioproc import messages
from blksnap_ublk.snapshot import same_device
from blksnap_ublk.snapshot.catalogue import (
    AreaEntry,
    Catalogue,
    DeviceEntry,
    ImageEntry,
    Phase,
    Served,
    SnapshotEntry,
    StorageEntry,
)
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.storage.beneath import Seat

MIB = 1 << 20


class Io:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[messages.Message] = []

    def call(self, message: messages.Message) -> None:
        self.told.append(message)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    made = SimpleNamespace(catalogue=Catalogue(tmp_path / "catalogue"), io=Io(), conditions={})
    return cast("Context", made)


def _area(physical: int, length: int, offset: int = 0, *, beneath: str | None = "d1", inode: int = 7) -> AreaEntry:
    return AreaEntry("/f", "storage:s:0", (8, 1), inode, offset, length, beneath=beneath, physical=physical)


def _storage(key: str, *areas: AreaEntry) -> StorageEntry:
    return StorageEntry(key=key, unit=4096, limit=None, on_overflow="break", areas=list(areas))


def _device(key: str) -> DeviceEntry:
    served = Served(ublk_id=3, queues=1, depth=1, desc_size=32, flags=0, zero_copy=False)
    return DeviceEntry(
        key=key,
        name=key,
        origin=f"/dev/{key}",
        number=(8, 0),
        size=1 << 30,
        block=512,
        unit=4096,
        tracking_block=65536,
        phase=Phase.ACTIVE,
        served=served,
    )


def _snapshot(name: str, storage: str, device: str, phase: Phase = Phase.ACTIVE) -> SnapshotEntry:
    image = ImageEntry(f"{name}.0", device, "/dev/ublkb0", "/dev/sda", 1 << 30, 4096, 1, "g", 1, None)
    return SnapshotEntry(
        id=name,
        created=name,
        phase=phase,
        frozen=False,
        gate_us=0,
        images=[image],
        storage_key=storage,
        members=[device],
    )


def test_ranges_of_all_storages_are_exempt_and_neighbours_are_one(context: Context) -> None:
    context.catalogue.put_storage(_storage("a", _area(8 * MIB, MIB), _area(2 * MIB, MIB)))
    context.catalogue.put_storage(
        _storage("b", _area(3 * MIB, MIB), _area(0, MIB, beneath="d2"), _area(0, MIB, beneath=None))
    )
    assert same_device.exempt_ranges(context, "d1") == [(2 * MIB, 2 * MIB), (8 * MIB, MIB)]
    assert same_device.exempt_ranges(context, "d2") == [(0, MIB)]
    same_device.exempt(context, _snapshot("s", "a", "d1").images[0])
    io = cast("Io", context.io)
    assert io.told == [messages.Exempt("s.0", [(2 * MIB, 2 * MIB), (8 * MIB, MIB)])]


def test_map_memory_for_ranges() -> None:
    assert same_device.map_bytes([]) == 0
    assert same_device.map_bytes([(0, MIB)]) == (2 << 10) + (4 << 10)
    assert same_device.map_bytes([(255 * MIB, 2 * MIB), (1 << 30, MIB)]) == 2 * (2 << 10) + 3 * (4 << 10)


def test_snapshots_whose_storage_lies_beneath_a_device(context: Context) -> None:
    announced = _area(0, 0, beneath="d3")
    storage = _storage("a", _area(0, MIB))
    context.catalogue.put_storage(
        StorageEntry(key="b", unit=4096, limit=None, on_overflow="break", areas=[], announced=[announced])
    )
    context.catalogue.put_storage(storage)
    context.catalogue.put_snapshot(_snapshot("s1", "a", "d2"))
    assert same_device.devices_beneath(storage) == {"d1"}
    assert same_device.devices_beneath(None) == set()
    assert same_device.storages_beneath(context, "d3") == {"b"}
    assert [entry.id for entry in same_device.snapshots_on(context, "d1")] == ["s1"]
    assert same_device.snapshots_on(context, "d2") == []


def test_blocks_that_cease_to_be_storage_are_marked_and_never_exempt_again(context: Context) -> None:
    context.catalogue.put_device(_device("d1"))
    other = _area(0, MIB, beneath=None, inode=9)
    storage = _storage("a", _area(2 * MIB, MIB), other, _area(8 * MIB, MIB, offset=MIB))
    context.catalogue.put_storage(storage)
    left = same_device.end(context, storage)
    io = cast("Io", context.io)
    assert io.told == [messages.Mark("d1", [(2 * MIB, MIB), (8 * MIB, MIB)])]
    assert left == context.catalogue.storage("a")
    assert left.areas == [other]
    assert [(area.descriptor, area.length, area.beneath) for area in left.announced] == [("storage:s:0", 0, "d1")]
    assert same_device.exempt_ranges(context, "d1") == []
    assert same_device.devices_beneath(left) == {"d1"}
    assert same_device.end(context, left) is left


def test_a_device_with_a_snapshot_gives_no_space_to_storage(context: Context) -> None:
    seat = Seat("d1", "/dev/ublkb3", 4096, DeviceNumber(259, 0), 0)
    same_device.refuse_held(context, [seat])
    context.catalogue.put_snapshot(_snapshot("s1", "a", "d1"))
    with pytest.raises(Unsupported, match=r"/dev/ublkb3: has snapshot s1, .*--storage @s1"):
        same_device.refuse_held(context, [seat])


@pytest.mark.parametrize("phase", [Phase.CREATING, Phase.DESTROYING])
def test_no_image_while_it_is_not_known_what_is_storage(context: Context, phase: Phase) -> None:
    device = _device("d1")
    same_device.refuse_unsettled(context, device)
    context.catalogue.put_storage(_storage("a", _area(0, MIB)))
    with pytest.raises(Busy, match="being given back"):
        same_device.refuse_unsettled(context, device)
    context.catalogue.put_snapshot(_snapshot("s1", "a", "d2", phase))
    with pytest.raises(Busy, match="being given back"):
        same_device.refuse_unsettled(context, device)
    same_device.refuse_unsettled(context, _device("d2"))
