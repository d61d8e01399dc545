# SPDX-License-Identifier: MIT
"""Wiping: the ranges read as zeroes from the medium itself, and nothing else has changed."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blksnap_ublk.snapshot.storage import wiping
from blksnap_ublk.snapshot.storage.wiping import wipe

UNIT = 4096
UNITS = 1024
SIZE = UNITS * UNIT

ranges_of_units = st.lists(st.tuples(st.integers(0, UNITS - 1), st.integers(0, 600)), max_size=4).map(
    lambda found: [(start * UNIT, min(count, UNITS - start) * UNIT) for start, count in found]
)


@contextmanager
def direct(path: str | Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def wiped(data: bytes, ranges: list[tuple[int, int]]) -> bytes:
    expected = bytearray(data)
    for start, length in ranges:
        expected[start : start + length] = bytes(length)
    return bytes(expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranges=ranges_of_units)
def test_a_file(ext4: Path, ranges: list[tuple[int, int]]) -> None:
    data = os.urandom(SIZE)
    path = ext4 / "file"
    path.write_bytes(data)
    os.sync()
    blocks = path.stat().st_blocks
    with direct(path) as descriptor:
        wipe(descriptor, ranges)
    assert path.read_bytes() == wiped(data, ranges)
    assert path.stat().st_blocks == blocks, "the space stays the file's"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranges=ranges_of_units)
def test_a_device(wiped_device: tuple[str, Path], ranges: list[tuple[int, int]]) -> None:
    device, image = wiped_device
    data = os.urandom(SIZE)
    image.write_bytes(data)
    with direct(device) as descriptor:
        wipe(descriptor, ranges)
    assert image.read_bytes() == wiped(data, ranges)


@pytest.fixture
def wiped_device(make_loop: Callable[..., str], tmp_path: Path) -> tuple[str, Path]:
    """A loop device, and the file that it is on."""
    return make_loop("disk", SIZE), tmp_path / "disk"


def test_a_device_that_takes_no_zeroing_call(wiped_device: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """BLKZEROOUT has another number in this test: no device knows it."""
    monkeypatch.setattr(wiping, "_BLKZEROOUT", 0x12FE)
    device, image = wiped_device
    data = os.urandom(SIZE)
    image.write_bytes(data)
    with direct(device) as descriptor:
        wipe(descriptor, [(UNIT, SIZE - 2 * UNIT)])
    assert image.read_bytes() == wiped(data, [(UNIT, SIZE - 2 * UNIT)])


def test_in_memory(tmp_path: Path) -> None:
    path = Path("/dev/shm") / f"wiping-{os.getpid()}"
    data = os.urandom(SIZE)
    try:
        path.write_bytes(data)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            wipe(descriptor, [(0, UNIT), (3 * UNIT, 2 << 20)])
        finally:
            os.close(descriptor)
        assert path.read_bytes() == wiped(data, [(0, UNIT), (3 * UNIT, 2 << 20)])
    finally:
        path.unlink()


def test_what_cannot_be_wiped_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(UNIT))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            wipe(descriptor, [(0, UNIT)])
    finally:
        os.close(descriptor)
    assert caught.value.errno == errno.EBADF
