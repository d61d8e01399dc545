# SPDX-License-Identifier: MIT
"""A device grows: what requests to images mark in the bitmap that was replaced is not lost."""

from __future__ import annotations

import numpy as np
from blksnap_ublk.engine._engine import lib

from blksnap_ublk import engine
from blksnap_ublk.engine.handle import pin
from blksnap_ublk.engine.sim import Simulator

BLOCK = 4096
PAGE = 4096


def test_late_marks_are_carried_over() -> None:
    """A thread that has the address of the former bitmap marks there until it has left the core once."""
    sim = Simulator()
    bitmaps = [np.zeros(PAGE, dtype=np.uint8) for _ in range(4)]
    former, former_trims, bitmap, trims = bitmaps
    origin = sim.add_file(32 * BLOCK)
    device = engine.Device(
        size=16 * BLOCK, unit=BLOCK, tracking_block=BLOCK, origin=origin, bitmap=former, swallowed=former_trims
    )
    former[0] = 0b1
    device.close_gate()
    assert not lib.bsu_device_resize(device.pointer, 32 * BLOCK, pin(bitmap), pin(trims))
    former[1] = 0b10
    assert list(bitmap[:4]) == [0b1, 0, 0xFF, 0xFF]
    while lib.bsu_settle(device.pointer):
        pass
    assert list(bitmap[:4]) == [0b1, 0b10, 0xFF, 0xFF]
    device.open_gate()
    device.close()
    sim.close()
