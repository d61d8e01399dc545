# SPDX-License-Identifier: MIT
"""Defects that reviews and sanitizers found, each with the shortest story that showed it."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from blksnap_ublk.engine._engine import ffi, lib

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from tests.unit.engine.disks import Arena, make_file, memory, storage
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.scenarios import drop, take
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

UNIT = 4096
BLOCK = 65536


def refused(caught: pytest.ExceptionInfo[OSError]) -> int | None:
    return caught.value.errno


def test_swallowed_trims_are_kept_while_an_image_is_held() -> None:
    """Sent to the origin then, they would take away what the image shows."""
    world = World(Shape(tracking_block=4096))
    disk = world.disks[0]
    take(world, 0, trouble=None)
    world.change(0, Op.DISCARD, 0, 16)
    complete_all(world)
    world.close_gate(0)
    assert disk.device.drained
    assert world.sim.next_swallowed(disk.device, 1 << 20) is None
    world.open_gate(0)
    drop(world, 0, None)
    world.close_gate(0)
    assert world.sim.next_swallowed(disk.device, 1 << 20) == (0, 8192)
    disk.words[:16] = 0
    disk.interval.touch(0, 8192)
    disk.zeroed[:16] = world.now
    world.open_gate(0)
    end(world)


def test_an_image_stays_until_the_switch_that_dropped_it_is_finished() -> None:
    """Other images of the chain may be read through its map until then."""
    world = World(Shape())
    device = world.disks[0].device
    take(world, 0, trouble=None)
    held = world.held[0]
    world.held.remove(held)
    device.prepare_drop(held.image)
    device.close_gate()
    lib.bsu_switch(device.pointer, ffi.NULL)
    device.open_gate()
    with pytest.raises(OSError, match="closing an image") as caught:
        held.image.close()
    assert refused(caught) == errno.EBUSY
    assert lib.bsu_settle(device.pointer) == 0
    held.image.close()
    end(world)


def test_a_null_device_has_no_images() -> None:
    """A read of one would have nothing to read from."""
    with (
        engine.Device(size=1 << 20) as device,
        Arena() as arena,
        engine.Storage(memory(engine.STORAGE_STATE_BYTES)) as store,
        engine.Image(device, store, arena, memory(engine.Image.state_bytes(1 << 20)), serial=1) as image,
    ):
        with pytest.raises(OSError, match="take") as caught:
            device.prepare_take(image)
        assert refused(caught) == errno.EINVAL


def test_scattered_trims_are_sent_in_short_slices(tmp_path: Path) -> None:
    """Each slice keeps the gate closed: writers get their turn in between."""
    blocks = 512
    size = blocks * BLOCK
    origin = make_file(tmp_path / "origin", size, seed=1, direct=False)
    swallowed = memory(blocks // 8)
    swallowed[: blocks // 8] = b"\x55" * (blocks // 8)
    with engine.Thread() as thread:
        device = engine.Device(
            size=size, tracking_block=BLOCK, origin=origin, bitmap=memory(blocks // 8), swallowed=swallowed
        )
        queue = engine.LocalQueue(thread, device=device, depth=4)
        last = size - UNIT
        for number in range(blocks):
            more = engine.replay_swallowed(thread, device, origin)
            queue.write(last, bytes([number % 255 + 1]) * UNIT)
            if not more:
                break
        assert not any(swallowed[:])
        data = np.fromfile(tmp_path / "origin", dtype=np.uint8).reshape(-1, BLOCK)
        assert not data[::2].any()
        assert data[1::2].any(axis=1).all()
        queue.finish()
        device.close()
    origin.close()


def test_queues_go_while_others_wake_them(tmp_path: Path) -> None:
    """A queue that was woken by another one's copy may end before the wake is over. Seen by TSan and ASan only."""
    size = 64 << 20
    origin = make_file(tmp_path / "origin", size, direct=False)
    with engine.Thread() as first, engine.Thread() as second, Arena() as arena, storage(tmp_path, size) as store:
        device = engine.Device(size=size, origin=origin)
        image = engine.Image(device, store, arena, memory(engine.Image.state_bytes(size)), serial=1)
        device.prepare_take(image)
        engine.switch_all([device], [None])
        engine.settle(device)
        steady = engine.LocalQueue(first, device=device, depth=4)
        data = memory(16 * UNIT)
        for start in range(0, size, len(data)):
            passing = engine.LocalQueue(second, device=device, depth=4)
            first_write = steady.submit(Op.WRITE, start, len(data), data)
            second_write = passing.submit(Op.WRITE, start, len(data), data)
            assert passing.wait(second_write) == len(data)
            # The other one is not waited for: that would put its wake before the end.
            passing.finish()
            assert steady.wait(first_write) == len(data)
        assert image.status == (ImageStatus.ACTIVE, 0)
        assert image.preserved == size
        steady.finish()
        device.prepare_drop(image)
        engine.switch_all([device], [None])
        engine.settle(device)
        image.close()
        device.close()
    origin.close()
