# SPDX-License-Identifier: MIT
"""The catalogue: what was put is there after a kill -9, and damage costs one object only."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

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
    return SnapshotEntry(
        id=key, created=created, phase=Phase.ACTIVE, frozen=True, gate_us=1, images=images, storage_key="s"
    )


def storage(key: str) -> StorageEntry:
    return StorageEntry(key=key, unit=4096, limit=None, on_overflow="break", areas=[])


def test_everything_is_there_again(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    catalogue.put_device(device("two"))
    catalogue.put_snapshot(snapshot("b", "2026-01-02"))
    catalogue.put_snapshot(snapshot("a", "2026-01-01"))
    catalogue.put_storage(storage("s"))
    catalogue.put_storage(storage("t"))
    catalogue.remove_storage("t")
    changed = msgspec.structs.replace(device("one"), phase=Phase.DESTROYING)
    catalogue.put_device(changed)
    catalogue.remove_device("two")
    again = Catalogue(tmp_path / "c")
    assert again.devices() == catalogue.devices() == [changed]
    assert [entry.id for entry in again.snapshots()] == ["a", "b"]
    assert again.storages() == catalogue.storages() == [storage("s")]
    assert again.storage("s") == storage("s")
    assert again.damaged == []


def test_files_are_private(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    catalogue.take_serials(1)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "c", *(tmp_path / "c").iterdir())]
    assert modes == [0o700] + [0o600] * 4


def flipped(data: bytes) -> Iterator[bytes]:
    """One bit of each byte, another one with each; all bits with BSU_ALL_BITS=1."""
    everything = os.environ.get("BSU_ALL_BITS") == "1"
    for at in range(len(data)):
        for bit in range(8) if everything else (at % 8,):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def cut(data: bytes) -> Iterator[bytes]:
    return (data[:length] for length in range(len(data)))


@pytest.mark.parametrize("damage", [flipped, cut])
@pytest.mark.parametrize("names", [["json"], ["copy"], ["json", "copy"]], ids="-".join)
def test_damage_anywhere_costs_that_object_only(
    tmp_path: Path, damage: Callable[[bytes], Iterator[bytes]], names: list[str]
) -> None:
    """And nothing at all where one of its two files is left."""
    directory = tmp_path / "c"
    catalogue = Catalogue(directory)
    catalogue.put_device(device("one"))
    catalogue.put_device(device("two"))
    whole = (directory / "device-one.json").read_bytes()
    for damaged in damage(whole):
        for name in ("json", "copy"):
            (directory / f"device-one.{name}").write_bytes(damaged if name in names else whole)
        again = Catalogue(directory)
        assert again.device("two") == device("two")
        # A change that JSON does not tell apart (1 and 1.0, say) is no damage.
        assert again.device("one") in ((device("one"),) if len(names) == 1 else (None, device("one"))), damaged
        assert again.damaged == ([] if again.device("one") else ["one"])
        assert Catalogue(directory).damaged == [], "a damaged file is set aside"


def test_a_file_of_another_version_is_damaged(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    for path in (tmp_path / "c").glob("device-one.*"):
        path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":9'))
    assert Catalogue(tmp_path / "c").damaged == ["one"]


def test_a_write_that_was_broken_off_leaves_what_was_before(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    (tmp_path / "c" / "device-one.writing").write_bytes(b"{")
    again = Catalogue(tmp_path / "c")
    assert again.devices() == [device("one")]
    assert sorted(os.listdir(tmp_path / "c")) == ["device-one.copy", "device-one.json", "spare"]


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    (tmp_path / "c" / "device-one.writing").mkdir()
    with pytest.raises(OSError, match="directory"):
        catalogue.put_device(device("one", "other"))
    assert catalogue.devices() == [device("one")]


def test_serials_are_not_given_twice(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    assert catalogue.take_serials(2) == [1, 2]
    catalogue.put_snapshot(snapshot("a", serials=(1, 2)))
    catalogue.remove_snapshot("a")
    assert catalogue.take_serials(1) == [3], "records of those that have gone may be in a storage still"
    assert Catalogue(tmp_path / "c").take_serials(1) == [4]


def test_serials_are_right_without_their_file(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_snapshot(snapshot("a", serials=(1, 7)))
    (tmp_path / "c" / "serial").write_text("what?")
    assert Catalogue(tmp_path / "c").take_serials(2) == [8, 9]


def test_serials_begin_again_without_those_in_use(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_snapshot(snapshot("a", serials=(2, (1 << 24) - 2)))
    assert Catalogue(tmp_path / "c").take_serials(4) == [(1 << 24) - 1, 1, 3, 4]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "small", place], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(place: Path) -> None:
    with (place / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_what_is_there_can_be_changed_where_no_room_is_left(small: Path) -> None:
    catalogue = Catalogue(small / "c")
    for n in range(12):
        catalogue.put_snapshot(snapshot(f"snapshot-{n}", serials=(n + 1,)))
    fill(small)
    with pytest.raises(OSError, match="No space"):
        catalogue.put_snapshot(snapshot("one-more"))
    assert catalogue.snapshot("one-more") is None
    with pytest.raises(OSError, match="No space"):
        catalogue.put_device(device("one"))
    for n in range(12):
        going = msgspec.structs.replace(snapshot(f"snapshot-{n}", serials=(n + 1,)), phase=Phase.DESTROYING)
        catalogue.put_snapshot(going)
        assert Catalogue(small / "c").snapshot(going.id) == going
    for n in range(12):
        catalogue.remove_snapshot(f"snapshot-{n}")
    assert Catalogue(small / "c").snapshots() == []


def test_a_file_that_is_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("one"))
    for path in (tmp_path / "c").glob("device-one.*"):
        path.write_bytes(b'{"x":' + b"[" * 100_000)
    assert Catalogue(tmp_path / "c").damaged == ["one"]
