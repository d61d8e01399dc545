# SPDX-License-Identifier: MIT
from __future__ import annotations

import random

from blksnap_ublk.engine._engine import ffi, lib


def crc32c(crc: int, data: bytes) -> int:
    return int(lib.bsu_crc32c(crc, ffi.from_buffer(data), len(data)))


def bit_by_bit(data: bytes) -> int:
    """The definition: polynomial 0x1edc6f41, reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_known_values() -> None:
    assert crc32c(0, b"") == 0
    assert crc32c(0, b"123456789") == 0xE3069283
    assert crc32c(0, bytes(32)) == 0x8A9136AA
    assert crc32c(0, b"\xff" * 32) == 0x62A8AB43


def test_every_length_and_alignment() -> None:
    data = random.Random(1).randbytes(80)
    for start in range(9):
        for end in range(start, 80):
            assert crc32c(0, data[start:end]) == bit_by_bit(data[start:end])
            middle = (start + end) // 2
            assert crc32c(crc32c(0, data[start:middle]), data[middle:end]) == bit_by_bit(data[start:end])
