# SPDX-License-Identifier: MIT
"""Bits that the core sets and finds are those that numpy sees."""

from __future__ import annotations

import random

import numpy as np

from blksnap_ublk import engine
from blksnap_ublk.engine.sim import Simulator

BLOCK = 4096
BLOCKS = 64 * 5 + 3
SIZE = BLOCKS * BLOCK - 512


def bits(memory: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> list[int]:
    return [int(block) for block in np.flatnonzero(np.unpackbits(memory, bitorder="little"))]


def test_marks() -> None:
    dice = random.Random(2)
    for _ in range(300):
        bitmap = np.zeros(4096, dtype=np.uint8)
        with engine.Device(size=SIZE, tracking_block=BLOCK, bitmap=bitmap) as device:
            expected: set[int] = set()
            for _ in range(dice.choice((1, 1, 3))):
                start = dice.choice((0, 63, 64, 127, 128, BLOCKS - 1, dice.randrange(BLOCKS))) * BLOCK
                start = min(start + dice.choice((0, 0, 1, 512)), SIZE - 1)
                length = min(dice.choice((1, 512, BLOCK, BLOCK + 1, 64 * BLOCK, 200 * BLOCK)), SIZE - start)
                device.mark(start, length)
                expected |= set(range(start // BLOCK, (start + length - 1) // BLOCK + 1))
            device.mark(0, 0)
            assert bits(bitmap) == sorted(expected)


def test_swallowed_trims_are_found_in_order_and_marked() -> None:
    dice = random.Random(3)
    for _ in range(300):
        swallowed, bitmap = np.zeros(4096, dtype=np.uint8), np.zeros(4096, dtype=np.uint8)
        chosen = sorted(
            {dice.choice((0, 63, 64, 65, BLOCKS - 1, dice.randrange(BLOCKS))) for _ in range(dice.randrange(9))}
        )
        for block in chosen:
            swallowed[block // 8] |= 1 << block % 8
        most = dice.choice((1, BLOCK, 2 * BLOCK, 1 << 40))
        found: list[int] = []
        with engine.Device(size=SIZE, tracking_block=BLOCK, bitmap=bitmap, swallowed=swallowed) as device:
            while part := Simulator.next_swallowed(device, most):
                start, length = part
                assert start % BLOCK == 0
                assert length % BLOCK == 0 or start + length == SIZE
                assert length <= max(most, BLOCK)
                found += range(start // BLOCK, (start + length - 1) // BLOCK + 1)
        assert found == chosen == bits(bitmap)
        assert not swallowed.any()
