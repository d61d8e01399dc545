# SPDX-License-Identifier: MIT
"""Devices, queues and images made and closed again and again beside a thread that stays: nothing becomes more.

500 times, or 10 000 where BSU_SOAK_SECONDS is set. The thread's pool is so small that buffers would run out if each
time lost one: the image would break then.
"""

from __future__ import annotations

import gc
import os
import resource
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk import engine
from tests.unit.engine.conftest import folder
from tests.unit.engine.disks import TRACKING_BLOCK, UNIT, Arena, make_file, memory, storage

__all__ = ["folder"]

CYCLES = 10_000 if "BSU_SOAK_SECONDS" in os.environ else 500
WARM_UP = 50
SIZE = 1 << 20
POOL = 2 << 20
STORAGE = 256 << 20
MEMORY_TOLERANCE = 2 << 20
"""For what the allocators keep; 500 leaks of a page are as much, 10 000 are twenty times more."""


@dataclass(frozen=True)
class Held:
    """What the process holds; `resident` in bytes."""

    descriptors: int
    tasks: int
    mappings: int
    resident: int


def held() -> Held:
    gc.collect()
    return Held(
        descriptors=len(os.listdir("/proc/self/fd")),
        tasks=len(os.listdir("/proc/self/task")),
        mappings=len(Path("/proc/self/maps").read_text().splitlines()),
        resident=int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
    )


def cycle(thread: engine.Thread, origin: engine.File, store: engine.Storage, arena: engine.Arena) -> None:
    """A device and its queue, an image and its queue: one unit is preserved and read, and all is gone again."""
    with ExitStack() as stack:
        bitmap, following, swallowed = (memory(UNIT) for _ in range(3))
        device = stack.enter_context(
            engine.Device(size=SIZE, tracking_block=TRACKING_BLOCK, origin=origin, bitmap=bitmap, swallowed=swallowed)
        )
        queue = stack.enter_context(engine.LocalQueue(thread, device=device, depth=4))
        image = stack.enter_context(engine.Image(device, store, arena, memory(image_state()), serial=1))
        device.prepare_take(image)
        engine.switch_all([device], [following])
        engine.settle(device)
        data = memory(UNIT)
        with engine.LocalQueue(thread, image=image, depth=4) as view:
            queue.write(0, data)
            view.read(0, data)
        assert image.preserved == UNIT
        device.prepare_drop(image)
        engine.switch_all([device], [None])
        engine.settle(device)


def image_state() -> int:
    return engine.Image.state_bytes(SIZE, UNIT)


def expect_flat(before: Held, after: Held) -> None:
    print(f"{CYCLES} cycles: {before} -> {after}")
    assert (after.descriptors, after.tasks) == (before.descriptors, before.tasks)
    if "san.so" not in os.environ.get("LD_PRELOAD", ""):  # sanitizers keep freed memory for a while
        assert after.mappings <= before.mappings + 4
        assert after.resident <= before.resident + MEMORY_TOLERANCE


def test_devices_and_images_beside_a_thread_that_stays(folder: Path) -> None:
    """Each time with a storage of its own."""
    with (
        engine.Thread(pool_bytes=POOL) as thread,
        make_file(folder / "origin", SIZE, seed=1) as origin,
        Arena() as arena,
    ):
        for number in range(-WARM_UP, CYCLES):
            if number == 0:
                before, free = held(), arena.free
            with storage(folder, 4 * UNIT) as store:
                cycle(thread, origin, store, arena)
                assert store.used <= UNIT
        assert arena.free == free
        expect_flat(before, held())


def test_places_are_given_out_once_for_each_unit_and_no_more(folder: Path) -> None:
    """A storage gives its places in order and ends with its last image: takes on one storage use one place each."""
    with (
        engine.Thread(pool_bytes=POOL) as thread,
        make_file(folder / "origin", SIZE, seed=1) as origin,
        Arena() as arena,
        storage(folder, (WARM_UP + CYCLES + 1) * UNIT) as store,
    ):
        for number in range(1, WARM_UP + CYCLES + 1):
            cycle(thread, origin, store, arena)
            assert store.used <= number * UNIT
            if number == WARM_UP:
                before, free = held(), arena.free
        print(f"places used: {store.used // UNIT} of {WARM_UP + CYCLES} units preserved")
        assert arena.free == free
        expect_flat(before, held())
