# SPDX-License-Identifier: MIT
"""Heads of state files and files of the catalogue, whatever they hold: they are read, or passed over, and no more."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blksnap_ublk.snapshot.catalogue import Catalogue, DeviceEntry, Phase, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.state_files import ImageStatus, StateFiles
from tests.unit.fuzz.datagrams import json_values

IMAGE_HEAD = struct.Struct("<IIQIIIiQQ")
STORAGE_HEAD = struct.Struct("<IIIIQQI20x")
u32 = st.sampled_from([0, 1, 4, 5, 77, (1 << 31) - 1, (1 << 32) - 1]) | st.integers(0, (1 << 32) - 1)
u64 = st.sampled_from([0, 1, (1 << 63) - 1, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1)
i32 = st.integers(-(1 << 31), (1 << 31) - 1)
image_magic = st.just(0x49555342) | u32
storage_magic = st.just(0x53555342) | u32
version = st.just(1) | u32
image_heads = st.tuples(image_magic, version, u64, u32, u32, u32, i32, u64, u64).map(
    lambda head: IMAGE_HEAD.pack(*head)
)
storage_heads = st.tuples(storage_magic, version, u32, u32, u64, u64, u32).map(lambda head: STORAGE_HEAD.pack(*head))
any_bytes = st.binary(max_size=100)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> StateFiles:
    return StateFiles(tmp_path_factory.mktemp("state"))


@given(head=image_heads | any_bytes, cut=st.integers(0, 200))
def test_any_head_of_an_image(state: StateFiles, head: bytes, cut: int) -> None:
    state.path("image").write_bytes(head[:cut])
    found = state.image_state("image")
    if found is not None:
        status = struct.unpack_from("<I", head, 24)[0]
        assert found.status == (status if status <= ImageStatus.GONE else ImageStatus.CORRUPTED)
        assert found.preserved >= 0


@given(head=storage_heads | any_bytes, cut=st.integers(0, 200))
def test_any_head_of_a_storage(state: StateFiles, head: bytes, cut: int) -> None:
    state.path("storage").write_bytes(head[:cut])
    found = state.storage_state("storage")
    assert found is None or 0 <= found.used <= found.capacity


def device(key: str) -> DeviceEntry:
    return DeviceEntry(key, "disk", "/dev/sdb", (8, 16), 1 << 30, 512, 4096, 65536, Phase.ACTIVE)


def snapshot(key: str) -> SnapshotEntry:
    return SnapshotEntry(key, "2026-01-31T12:00:00.000000Z", Phase.ACTIVE, True, 1, [], "s")


def storage(key: str) -> StorageEntry:
    return StorageEntry(key=key, unit=4096, limit=None, on_overflow="break", areas=[])


def framed(entry: object) -> bytes:
    """A file of the catalogue whose version and checksum are right."""
    body = json.dumps(entry).encode()
    return b'{"version":1,"checksum":%d,"entry":%s}' % (zlib.crc32(body), body)


def fields_of(entry: msgspec.Struct) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(entry))
    return found


@st.composite
def entries(draw: st.DrawFn) -> object:
    """An entry with some of its fields changed or lacking, or any JSON."""
    if draw(st.booleans()):
        return draw(json_values)
    entry = fields_of(draw(st.sampled_from([device, snapshot, storage]))("one"))
    for name in draw(st.sets(st.sampled_from(sorted(entry)), max_size=3)):
        if draw(st.booleans()):
            entry[name] = draw(json_values)
        else:
            del entry[name]
    return entry


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["device", "snapshot", "storage"]), content=entries().map(framed) | st.binary(max_size=200))
def test_any_file_of_the_catalogue_costs_that_object_only(
    tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes
) -> None:
    directory = tmp_path_factory.mktemp("catalogue")
    catalogue = Catalogue(directory)
    catalogue.put_device(device("other"))
    catalogue.put_snapshot(snapshot("other"))
    catalogue.put_storage(storage("other"))
    (directory / f"{kind}-one.json").write_bytes(content)
    again = Catalogue(directory)
    found = {"device": again.device, "snapshot": again.snapshot, "storage": again.storage}[kind]("one")
    assert again.damaged == ([] if found is not None else ["one"])
    assert again.device("other") == device("other")
    assert again.snapshot("other") == snapshot("other")
    assert again.storage("other") == storage("other")
    there = [*again.devices(), *again.snapshots(), *again.storages()]
    assert len(there) == (4 if found is not None else 3)
    assert all(serial > 0 for serial in again.take_serials(2))
    if found is not None:
        forms = {"device": DeviceEntry, "snapshot": SnapshotEntry, "storage": StorageEntry}
        assert isinstance(found, forms[kind])


@pytest.mark.parametrize(
    "name", ["device-.json", "device-one", "snapshot-\udcff.json", "device-a.b.json", "other.json"]
)
def test_any_name_of_a_file(tmp_path: Path, name: str) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.put_device(device("other"))
    (tmp_path / "c" / name).write_bytes(b"rubbish")
    assert Catalogue(tmp_path / "c").devices() == [device("other")]
