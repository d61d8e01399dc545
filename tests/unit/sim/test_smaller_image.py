# SPDX-License-Identifier: MIT
"""A device has grown since an image of it was taken; another death comes while a younger one is taken apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from blksnap_ublk.engine._engine import lib

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.handle import pin
from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import Simulator

UNIT = 512
SMALL = 65536 * UNIT
"""What one table of a map is for."""

SIZE = SMALL + 64 * UNIT
BLOCK = 65536
ROOM = 1 << 20
STATUS, RELEASING, DIRECTORY = 6, 14, 1024
"""32-bit words of an image's state."""


class Process:
    """A device, a storage and its images, on memory that outlives it."""

    def __init__(self, former: Process | None, size: int) -> None:
        self.sim = Simulator()
        origin = self.sim.add_file(SIZE)
        room = self.sim.add_file(ROOM)
        self.arena = engine.Arena()
        adopt = former is not None
        self.portion: Any = former.portion if former else np.zeros(engine.ARENA_PORTION, dtype=np.uint8)
        self.state: Any = former.state if former else np.zeros(engine.STORAGE_STATE_BYTES, dtype=np.uint8)
        self.arena.add(self.portion, adopt=adopt)
        self.storage = engine.Storage(self.state, unit=UNIT, number=1, adopt=adopt)
        if not former:
            self.records: Any = np.zeros(self.storage.records_bytes(ROOM), dtype=np.uint8)
        else:
            self.records = former.records
        self.storage.add_area(room, 0, ROOM, self.records)
        self.bitmaps = [np.zeros(4096, dtype=np.uint8) for _ in range(4)]
        bitmap, swallowed = self.bitmaps[:2]
        self.device = engine.Device(
            size=size, unit=UNIT, tracking_block=BLOCK, origin=origin, bitmap=bitmap, swallowed=swallowed
        )
        self.images: dict[int, tuple[engine.Image, Any]] = {}
        for serial, (_, state) in former.images.items() if former else ():
            adopted = engine.Adopted(int(state.view(np.uint64)[1]), (bitmap, bitmap))
            image = engine.Image(self.device, self.storage, self.arena, state, serial=serial, adopt=adopted)
            self.images[serial] = (image, state)

    def take(self, serial: int, size: int) -> None:
        state = np.zeros(engine.Image.state_bytes(size, UNIT), dtype=np.uint8)
        image = engine.Image(self.device, self.storage, self.arena, state, serial=serial)
        self.device.close_gate()
        self.device.prepare_take(image)
        self.sim.switch([self.device], [None])
        self.device.open_gate()
        self.images[serial] = (image, state)

    def grow(self) -> None:
        self.device.close_gate()
        assert not lib.bsu_device_resize(self.device.pointer, SIZE, *(pin(each) for each in self.bitmaps[2:]))
        while self.sim.settle(self.device):
            pass
        self.device.open_gate()

    def write(self, start: int) -> None:
        thread = self.sim.add_thread(2 << 20)
        queue = self.sim.add_queue(thread, device=self.device, depth=1, zero_copy=True)
        assert self.sim.request(queue, Op.WRITE, 0, start, UNIT, np.ones(UNIT, dtype=np.uint8)) is not None
        while not self.sim.results():
            for io in self.sim.started():
                self.sim.complete(io.id)
            self.sim.run()
        self.sim.del_queue(queue)

    def drop(self, serial: int) -> None:
        image, _ = self.images.pop(serial)
        self.device.close_gate()
        self.device.prepare_drop(image)
        self.device.begin_drop()
        self.sim.switch([self.device], [None])
        self.device.open_gate()
        image.close()

    def kill(self) -> None:
        self.sim.kill([self.device], [image for image, _ in self.images.values()], [self.storage, self.arena])


def test_places_beyond_the_end_of_an_older_image() -> None:
    """They are not handed to it, nor are their records its own, or those of an image that is known any more."""
    former = Process(None, SMALL)
    former.take(1, SMALL)
    former.grow()
    former.take(2, SIZE)
    former.take(3, SIZE)
    former.write(SMALL + 5 * UNIT)
    former.drop(3)
    former.kill()
    going = former.images[2][1].view(np.uint32)
    assert going[DIRECTORY + 1], "it has what the youngest had"
    going[STATUS], going[RELEASING], going[DIRECTORY + 1] = ImageStatus.GONE, 2, 0
    process = Process(former, SIZE)
    sweep = engine.Sweep(process.arena, [process.storage], [image for image, _ in process.images.values()])
    assert sweep.run()
    sweep.close()
    assert process.images[1][0].status == (ImageStatus.ACTIVE, 0)
    process.kill()
