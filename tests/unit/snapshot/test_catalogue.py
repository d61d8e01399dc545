# SPDX-License-Identifier: MIT
"""The catalogue: what was put is there after a kill -9, and damage costs one object only."""

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blksnap_ublk.snapshot.catalogue import (
    Catalogue,
    DeviceEntry,
    ImageEntry,
    Phase,
    Served,
    SnapshotEntry,
    StorageEntry,
)

SERVED = Served(ublk_id=3, queues=2, depth=128, desc_size=24, flags=1 << 11, zero_copy=True)


def device(key: str, name: str = "disk") -> DeviceEntry:
    return DeviceEntry(
        key=key,
        name=name,
        origin="/dev/sdb",
        number=(8, 16),
        size=1 << 30,
        block=512,
        unit=4096,
        tracking_block=65536,
        phase=Phase.ACTIVE,
        served=SERVED,
    )


def snapshot(key: str, created: str = "2026-01-31T12:00:00.000000Z", serials: tuple[int, ...] = ()) -> SnapshotEntry:
    images = [
        ImageEntry(
            key=f"{key}.{n}",
            device="d",
            filtered="/dev/ublkb3",
            origin="/dev/sdb",
            size=1 << 30,
            unit=4096,
            serial=serial,
            generation="g",
            change_number=n + 1,
            served=None,
        )
        for n, serial in enumerate(serials)
    ]
    storage = StorageEntry(key=key, unit=4096, limit=None, on_overflow="break", areas=[])
    return SnapshotEntry(
        id=key, created=created, phase=Phase.ACTIVE, frozen=True, gate_us=1, images=images, storage=storage
    )


def test_everything_is_there_again(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    catalogue.put_device(device("two"))
    catalogue.put_snapshot(snapshot("b", "2026-01-02"))
    catalogue.put_snapshot(snapshot("a", "2026-01-01"))
    changed = msgspec.structs.replace(device("one"), phase=Phase.DESTROYING)
    catalogue.put_device(changed)
    catalogue.remove_device("two")
    again = Catalogue(tmp_path / "c")
    assert again.devices() == catalogue.devices() == [changed]
    assert [entry.id for entry in again.snapshots()] == ["a", "b"]
    assert again.damaged == []


def test_files_are_private(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "c", *(tmp_path / "c").iterdir())]
    assert modes == [0o700, 0o600]


@settings(max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_anywhere_costs_that_object_only(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int, cut: bool
) -> None:
    directory = tmp_path_factory.mktemp("c")
    catalogue = Catalogue(directory)
    catalogue.put_device(device("one"))
    catalogue.put_device(device("two"))
    path = directory / "device-one.json"
    data = bytearray(path.read_bytes())
    at = int(where * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    path.write_bytes(data)
    again = Catalogue(directory)
    assert again.device("two") == device("two")
    # A change that JSON does not tell apart (1 and 1.0, say) is no damage.
    assert again.device("one") in (None, device("one"))
    assert again.damaged == ([] if again.device("one") else ["one"])
    assert Catalogue(directory).damaged == [], "a damaged file is set aside"


def test_a_file_of_another_version_is_damaged(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    path = tmp_path / "c" / "device-one.json"
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":9'))
    assert Catalogue(tmp_path / "c").damaged == ["one"]


def test_a_write_that_was_broken_off_leaves_what_was_before(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    (tmp_path / "c" / "device-one.writing").write_bytes(b"{")
    again = Catalogue(tmp_path / "c")
    assert again.devices() == [device("one")]
    assert sorted(os.listdir(tmp_path / "c")) == ["device-one.json"]


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    (tmp_path / "c" / "device-one.writing").mkdir()
    with pytest.raises(OSError, match="directory"):
        catalogue.put_device(device("one", "other"))
    assert catalogue.devices() == [device("one")]


def test_serials_are_those_that_no_image_has(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    assert catalogue.next_serial() == 1
    catalogue.put_snapshot(snapshot("a", serials=(1, 3)))
    assert catalogue.next_serial() == 2
    catalogue.put_snapshot(snapshot("b", serials=(2,)))
    assert catalogue.next_serial() == 4


def test_a_file_that_is_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    (tmp_path / "c" / "device-one.json").write_bytes(b'{"x":' + b"[" * 100_000)
    assert Catalogue(tmp_path / "c").damaged == ["one"]
