# SPDX-License-Identifier: MIT
"""What the core refuses to make, and where its tables end."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from blksnap_ublk.engine._engine import ffi, lib

from blksnap_ublk import engine
from blksnap_ublk.engine.sim import HeldMapMemory, Simulator

AREAS = 4096


def pages(count: int) -> Any:
    return np.zeros(count * 4096, dtype=np.uint8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 4096 + 1},
        {"block": 0},
        {"block": 256},
        {"block": 1536},
        {"unit": 0},
        {"unit": 256},
        {"unit": 6144},
        {"unit": 131072, "tracking_block": 131072},
        {"tracking_block": 2048},
        {"tracking_block": 5000},
        {"bitmap": None, "swallowed": None},
        {"tracking_block": 0, "bitmap": None},
    ],
)
def test_devices_that_make_no_sense(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"size": 1 << 20, "block": 512, "unit": 4096, "tracking_block": 65536}
    engine.Device(**right, bitmap=pages(1), swallowed=pages(1)).close()
    with pytest.raises(OSError, match="device") as caught:
        engine.Device(**{**right, "bitmap": pages(1), "swallowed": pages(1), **wrong})
    assert caught.value.errno == errno.EINVAL


def test_storage_has_places_for_so_many_areas() -> None:
    with Simulator() as sim:
        storage = engine.Storage(pages(5), unit=4096)
        file = sim.add_file(4096)
        for _ in range(AREAS):
            storage.add_area(file, 0, 4096, pages(1))
        for length, error in ((4096, errno.ENOSPC), (4095, errno.EINVAL)):
            with pytest.raises(OSError, match="area") as caught:
                storage.add_area(file, 0, length, pages(1))
            assert caught.value.errno == error
        assert storage.capacity == AREAS * 4096
        assert (storage.used, storage.area_used(0), storage.area_used(AREAS)) == (0, 0, 0)
        storage.close()
    for unit in (0, 256, 1000):
        with pytest.raises(OSError, match="storage") as caught:
            engine.Storage(pages(5), unit=unit)
        assert caught.value.errno == errno.EINVAL


@pytest.fixture
def device() -> Iterator[engine.Device]:
    """With an origin, which an image needs."""
    with Simulator() as sim, engine.Device(size=1 << 20, origin=sim.add_file(1 << 20)) as made:
        yield made


@pytest.mark.parametrize("serial", [0, 1 << 24])
def test_images_that_make_no_sense(device: engine.Device, serial: int) -> None:
    with engine.Arena() as arena, engine.Storage(pages(5)) as storage, engine.Storage(pages(5), unit=8192) as other:
        engine.Image(device, storage, arena, pages(3), serial=1).close()
        for given, number in ((storage, serial), (other, 1)):
            with pytest.raises(OSError, match="image") as caught:
                engine.Image(device, given, arena, pages(3), serial=number)
            assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("missing", ["device", "storage", "arena", "state"])
def test_images_that_lack_a_part(device: engine.Device, missing: str) -> None:
    with engine.Arena() as arena, engine.Storage(pages(5)) as storage:
        parts = {"device": device.pointer, "storage": storage.pointer, "arena": arena.pointer, "serial": 1}
        state = ffi.from_buffer(pages(3))
        config = ffi.new("struct bsu_image_config *", {**parts, "state": state, missing: ffi.NULL})
        error = ffi.new("int *")
        assert lib.bsu_image_new(config, error) == ffi.NULL
        assert error[0] == -errno.EINVAL


def test_a_storage_that_lacks_its_state() -> None:
    error = ffi.new("int *")
    assert lib.bsu_storage_new(ffi.new("struct bsu_storage_config *", {"unit": 4096}), error) == ffi.NULL
    assert error[0] == -errno.EINVAL


def test_what_a_change_of_images_needs_stays_until_it_is_cancelled(device: engine.Device) -> None:
    with engine.Arena() as arena, engine.Storage(pages(5)) as storage:
        image, other = (engine.Image(device, storage, arena, pages(3), serial=serial) for serial in (1, 2))
        device.prepare_take(image)
        for refused, error in (
            (image.close, errno.EBUSY),
            (device.close, errno.EBUSY),
            (lambda: device.prepare_take(other), errno.EBUSY),
        ):
            with pytest.raises(OSError, match=r"closing|preparing") as caught:
                refused()
            assert caught.value.errno == error
        other.close()
        device.cancel()
        image.close()


def test_a_device_stays_while_it_is_used() -> None:
    with Simulator() as sim:
        device = engine.Device(size=1 << 20)
        queue = sim.add_queue(sim.add_thread(2 << 20), device=device, depth=1, zero_copy=True)
        with pytest.raises(OSError, match="closing a device") as caught:
            device.close()
        assert caught.value.errno == errno.EBUSY
        sim.del_queue(queue)
        assert sim.next_swallowed(device, 1 << 20) is None
        device.close()


def test_the_first_reason_for_breaking_stays(device: engine.Device) -> None:
    with engine.Arena() as arena, engine.Storage(pages(5)) as storage:
        image = engine.Image(device, storage, arena, pages(3), serial=1)
        image.break_(engine.ImageStatus.OVERFLOWN, errno.ENOSPC)
        image.break_(engine.ImageStatus.CORRUPTED, errno.EIO)
        assert image.status == (engine.ImageStatus.OVERFLOWN, errno.ENOSPC)
        image.close()


def test_freeing_nothing_is_allowed() -> None:
    lib.bsu_arena_free(ffi.NULL)
    lib.bsu_storage_free(ffi.NULL)
    assert lib.bsu_device_free(ffi.NULL) == lib.bsu_image_free(ffi.NULL) == 0


def test_storage_has_no_more_places_than_a_slot_can_name() -> None:
    with Simulator() as sim, engine.Storage(pages(5), unit=512) as storage:
        file, records = sim.add_file(4096), ffi.cast("void *", 4096)  # never looked at: nothing is given out
        most = 512 * 0xFFFFFFF0
        assert lib.bsu_storage_add_area(storage.pointer, file.pointer, 0, most + 512, records) == -errno.ENOSPC
        assert lib.bsu_storage_add_area(storage.pointer, file.pointer, 0, most, records) == 0
        assert lib.bsu_storage_add_area(storage.pointer, file.pointer, 0, 512, records) == -errno.ENOSPC
        assert lib.bsu_storage_add_area(storage.pointer, file.pointer, 0, 512, ffi.NULL) == -errno.EINVAL


def test_map_memory_has_a_limit() -> None:
    memory = np.zeros(engine.ARENA_PORTION, dtype=np.uint8)
    with engine.Arena() as arena:
        for _ in range(1024):
            arena.add(memory)
        with pytest.raises(OSError, match="map memory") as caught:
            arena.add(memory)
        assert caught.value.errno == errno.ENOSPC
        assert arena.total == 1024 * engine.ARENA_PORTION


def test_map_memory_is_counted() -> None:
    with engine.Arena() as arena:
        arena.add(np.zeros(engine.ARENA_PORTION, dtype=np.uint8))
        assert arena.free == arena.total == engine.ARENA_PORTION
        with HeldMapMemory(arena, leave=3) as held:
            assert arena.free == 3 * 4096
            assert held.give_back(2) == engine.ARENA_PORTION // 4096 - 5
            assert arena.free == 5 * 4096
        assert arena.free == arena.total


def test_pools_and_queues_that_make_no_sense() -> None:
    with Simulator() as sim, engine.Device(size=1 << 20) as device:
        for size in (0, 4096, 3 * 4096):
            with pytest.raises(OSError, match="thread"):
                sim.add_thread(size)
        small = sim.add_thread(1 << 20)
        large = sim.add_thread(2 << 20)
        for thread, depth in ((small, 1), (large, 0)):
            with pytest.raises(OSError, match="queue") as caught:
                sim.add_queue(thread, device=device, depth=depth, zero_copy=True)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError, match="queue"):
            sim.add_queue(large, depth=1, zero_copy=True)
