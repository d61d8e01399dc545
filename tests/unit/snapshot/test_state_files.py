# SPDX-License-Identifier: MIT
"""State files: allocated ahead, private, and read as csrc/core/state.h lays them out."""

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk import engine
from blksnap_ublk.engine import Image, Storage
from blksnap_ublk.errors import Failed
from blksnap_ublk.snapshot import state_files
from blksnap_ublk.snapshot.state_files import ImageStatus, StateFiles
from tests.loop_devices import run

UNITS = st.sampled_from([512, 4096, 65536])
GIB = 1 << 30


@pytest.fixture
def state(tmp_path: Path) -> StateFiles:
    return StateFiles(tmp_path)


def test_a_file_is_private_zeroed_and_has_all_its_space(state: StateFiles) -> None:
    descriptor = state.create("one", 3 << 20)
    try:
        status = os.fstat(descriptor)
        assert status.st_mode & 0o7777 == 0o600
        assert status.st_size == 3 << 20
        assert status.st_blocks * 512 >= 3 << 20
        assert os.pread(descriptor, 4 << 20, 0).count(0) == 3 << 20
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


def test_what_an_interrupted_attempt_left_is_replaced(state: StateFiles) -> None:
    state.path("one").write_bytes(b"rubbish")
    descriptor = state.create("one", 4096)
    assert os.pread(descriptor, 7, 0) == bytes(7)
    os.close(descriptor)


def test_removing_takes_files_and_directories_and_may_be_repeated(state: StateFiles) -> None:
    os.close(state.create("one", 4096))
    state.path("two").mkdir()
    (state.path("two") / "file").touch()
    for name in ("one", "two", "one", "two", "never"):
        state.remove(name)
    assert state.names() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: a small tmpfs cannot be mounted")
def test_a_full_state_directory_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path))
    try:
        state = StateFiles(tmp_path)
        with pytest.raises(Failed, match=r"ENOSPC.*--state-size"):
            state.create("large", 2 << 20)
        assert state.names() == []
        os.close(state.create("small", 4096))
    finally:
        run("umount", str(tmp_path))


@given(size=st.integers(1, 64 * GIB), unit=UNITS)
def test_lengths_are_those_of_the_core(size: int, unit: int) -> None:
    length = state_files.image_state_bytes(size, unit)
    assert length % 4096 == 0
    assert length >= Image.state_bytes(size, unit)
    assert state_files.storage_state_bytes() >= engine.STORAGE_STATE_BYTES
    with Storage(bytearray(engine.STORAGE_STATE_BYTES), unit=unit) as storage:
        assert state_files.records_bytes(size, unit) >= storage.records_bytes(size)


def test_the_head_of_a_storage_is_read(state: StateFiles) -> None:
    descriptor = state.create("storage", state_files.storage_state_bytes())
    assert state.storage_state("storage") is None
    os.pwrite(descriptor, struct.pack("<IIIIQQQI20xII", 0x53555342, 4, 4096, 2, 50, 100, 7, 0, 3, 4), 0)
    os.close(descriptor)
    found = state.storage_state("storage")
    assert found is not None
    assert (found.used, found.capacity, found.areas) == (7, 100, (3, 4))
    assert state.storage_state("none") is None


def test_more_places_given_out_than_there_are_count_as_all(state: StateFiles) -> None:
    descriptor = state.create("storage", state_files.storage_state_bytes())
    os.pwrite(descriptor, struct.pack("<IIIIQQQI", 0x53555342, 4, 4096, 2, 100, 100, 105, 1), 0)
    os.close(descriptor)
    found = state.storage_state("storage")
    assert found is not None
    assert found.used == 100


@pytest.mark.parametrize(
    ("status", "meaning"), [(1, ImageStatus.ACTIVE), (2, ImageStatus.OVERFLOWN), (77, ImageStatus.CORRUPTED)]
)
def test_the_head_of_an_image_is_read(state: StateFiles, status: int, meaning: ImageStatus) -> None:
    descriptor = state.create("image", state_files.image_state_bytes(GIB, 4096))
    assert state.image_state("image") is None
    os.pwrite(descriptor, struct.pack("<IIQIIIiQQQ", 0x49555342, 4, GIB, 4096, 3, status, 28, 9, 4, 2), 0)
    os.close(descriptor)
    found = state.image_state("image")
    assert found is not None
    assert (found.status, found.error, found.preserved, found.written) == (meaning, 28, 9 * 4096, 2 * 4096)
