# SPDX-License-Identifier: MIT
"""Single rules of the core, each with the shortest story that shows it."""

from __future__ import annotations

import errno
import functools
from typing import Any

import numpy as np
import pytest
from blksnap_ublk.engine._engine import ffi, lib

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Flags, Op
from blksnap_ublk.engine.sim import Simulator
from tests.unit.sim.ending import complete_all, end
from tests.unit.sim.held import Held
from tests.unit.sim.look import ACTIVE, find, io_of, statuses, waiting
from tests.unit.sim.scenarios import take
from tests.unit.sim.script import Kind
from tests.unit.sim.shape import SECTOR, Shape
from tests.unit.sim.world import World


@pytest.mark.parametrize("zero_copy", [True, False])
def test_the_order_of_a_first_overwrite(zero_copy: bool) -> None:
    world = World(Shape(zero_copy=zero_copy))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 4, 8, Flags.FUA)
    assert waiting(world) == [Kind.COPY_READ]
    assert (io_of(world, Kind.COPY_READ).offset, io_of(world, Kind.COPY_READ).length) == (0, 8192)
    world.complete(0)
    assert waiting(world) == [Kind.COPY_WRITE]
    assert not world.held[0].has(0)
    world.complete(0)
    assert waiting(world) == [Kind.CHANGE]
    assert world.held[0].has(0)
    assert world.held[0].has(1)
    io = io_of(world, Kind.CHANGE)
    assert (io.offset, io.length, io.flags) == (2048, 4096, Flags.FUA)
    world.complete(0)
    # now it is an ordinary write
    world.change(0, Op.WRITE, 0, 16)
    assert waiting(world) == [Kind.CHANGE]
    complete_all(world)
    assert world.held[0].image.preserved == world.stores[0].storage.used == 8192
    end(world)


@pytest.mark.parametrize("zero_copy", [True, False])
def test_an_image_read_that_a_write_overtakes_is_done_again(zero_copy: bool) -> None:
    world = World(Shape(zero_copy=zero_copy))
    take(world, 0, trouble=None)
    world.read_image(0, 2, 9)
    assert waiting(world) == [Kind.IMAGE_FROM_ORIGIN]
    world.change(0, Op.WRITE, 0, 4)
    for _ in range(3):
        world.complete(1)
    # it gets the overwritten data, and asks again
    world.complete(find(world, Kind.IMAGE_FROM_ORIGIN))
    assert waiting(world) == [Kind.IMAGE_FROM_STORAGE]
    complete_all(world)
    end(world)


@pytest.mark.parametrize("record_byte", [None, 0, 6, 8, 12])
def test_a_read_from_storage_is_verified(record_byte: int | None) -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 24)
    complete_all(world)
    world.damage(0, 1, record_byte)
    world.read_image(0, 0, 8)
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    world.read_image(0, 0, 24)
    complete_all(world)
    assert statuses(world) == [(ImageStatus.CORRUPTED, errno.EBADMSG)]
    end(world)


def test_a_record_that_belongs_to_another_unit() -> None:
    """What is in the place may be in order, and yet not be what was preserved for the unit."""
    world = World(Shape())
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 16)
    complete_all(world)
    store = world.stores[0]
    [(_, records)], [(file, _)] = store.records, store.files.values()
    for memory, size in ((records, 16), (np.frombuffer(file.data, np.uint8)[SECTOR:], world.shape.unit)):
        memory[: 2 * size] = np.concatenate([memory[size : 2 * size], memory[:size]])
    store.damaged |= {0, 1}
    world.read_image(0, 0, 8)
    complete_all(world)
    assert statuses(world) == [(ImageStatus.CORRUPTED, errno.EBADMSG)]
    end(world)


def test_more_than_was_asked_for_is_an_error() -> None:
    world = World(Shape())
    data = bytearray(4096)
    world.sim.request(world.device_queues[0], Op.WRITE, 0, 0, 4096, data)
    [io] = world.sim.started()
    world.sim.complete(io.id, 8192)
    assert [ended.result for ended in world.sim.results()] == [-errno.EIO]


def test_an_unreadable_unit_is_bad_alone() -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 24)
    world.complete(0, error=errno.EIO)  # three units: each is read alone now
    world.complete(0)
    world.complete(0, error=errno.EIO)
    complete_all(world)
    assert statuses(world) == [ACTIVE, ACTIVE]
    results = {}
    for image in range(2):
        for unit in range(3):
            request = world.read_image(image, unit * 8, 8)
            assert request
            before = len(world.requests)
            complete_all(world)
            results[image, unit] = before == 1
    assert results == {(image, unit): unit != 1 for image in range(2) for unit in range(3)}
    end(world)


def test_a_failing_storage_breaks_only_what_lacks_the_unit() -> None:
    world = World(Shape(storages=((100,), (100,))))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    take(world, 0, trouble=None)
    take(world, 0, store=1, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    for _ in range(2):
        world.complete(find(world, Kind.COPY_READ))
    stores = [world.store_of(io) for io in world.ios.values()]
    world.complete(stores.index(world.stores[0]), error=errno.ENOSPC)
    complete_all(world)
    assert statuses(world) == [ACTIVE, (ImageStatus.CORRUPTED, errno.ENOSPC), ACTIVE]
    world.change(0, Op.WRITE, 8, 8)
    complete_all(world)
    assert statuses(world) == [ACTIVE, (ImageStatus.CORRUPTED, errno.ENOSPC), ACTIVE]
    end(world)


def test_storage_that_grows_in_time() -> None:
    world = World(Shape(storages=((2, 1),)))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 24)
    complete_all(world)
    world.grow(0, 1)
    world.change(0, Op.WRITE, 24, 8)
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    assert [world.stores[0].storage.area_used(area) for area in range(4)] == [8192, 4096, 4096, 0]
    world.change(0, Op.WRITE, 32, 8)
    assert waiting(world) == [Kind.CHANGE]
    assert statuses(world) == [(ImageStatus.OVERFLOWN, errno.ENOSPC)]
    end(world)


def test_trims_are_remembered_by_whole_blocks_until_overwritten() -> None:
    world = World(Shape(units=16, odd_sectors=1, tracking_block=8192))
    disk = world.disks[0]

    def remembered() -> list[int]:
        return [int(block) for block in np.flatnonzero(np.unpackbits(disk.swallowed, bitorder="little"))]

    take(world, 0, trouble=None)
    world.change(0, Op.DISCARD, 1, 1000)
    assert remembered() == [1, 2, 3, 4, 5, 6, 7]  # the last block is short, but whole
    assert not world.ios
    world.change(0, Op.WRITE, 40, 1)
    complete_all(world)
    assert remembered() == [1, 3, 4, 5, 6, 7]
    assert not world.replay(0, 8192), "an image is held"
    world.change(0, Op.WRITE, 32, 8)
    complete_all(world)
    world.change(0, Op.DISCARD, 16, 40)  # the units of block 2 are preserved: a hole of it is sent
    assert waiting(world) == [Kind.CHANGE]
    assert (io_of(world, Kind.CHANGE).offset, io_of(world, Kind.CHANGE).length) == (32 * SECTOR, 16 * SECTOR)
    complete_all(world)
    end(world)


def test_requests_that_make_no_sense() -> None:
    world = World(Shape())
    sim, size = world.sim, world.shape.size
    take(world, 0, trouble=None)
    world.read_image(0, 0, 1)
    complete_all(world)
    data = bytearray(8192)
    image = world.held[0].queue
    assert image is not None

    def result(queue: int, op: int, start: int, length: int) -> int:
        number = sim.request(queue, op, 0, start, length, data)
        [ended] = sim.results()
        assert ended.id == number
        return ended.result

    queue = world.device_queues[0]
    far = 2**64 - 512
    for start, length in ((1, 512), (0, 511), (0, 0), (size, 512), (size - 512, 1024), (far, 512), (512, far)):
        for at in (queue, image):
            assert result(at, Op.READ, start, length) == -errno.EINVAL
        assert result(queue, Op.WRITE, start, length) == -errno.EINVAL
    assert result(queue, 7, 0, 512) == -errno.EOPNOTSUPP
    assert result(image, Op.DISCARD, 0, 512) == -errno.EOPNOTSUPP
    assert result(image, Op.FLUSH, 0, 0) == 0
    end(world)


def test_data_that_cannot_be_fetched_or_delivered() -> None:
    world = World(Shape(zero_copy=False))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    for op in (Op.WRITE, Op.READ):
        world.fail_data()
        if op is Op.WRITE:
            world.change(0, op, 0, 8)
        else:
            world.read(0, 0, 8)
        complete_all(world)
    world.fail_data()
    world.read_image(0, 0, 8)
    complete_all(world)
    assert not world.requests
    assert statuses(world) == [ACTIVE]
    end(world)


def test_what_is_in_use_stays() -> None:
    world = World(Shape(disks=2))
    disk = world.disks[0]

    def refused(error: int, function: Any, *arguments: Any) -> None:
        with pytest.raises(OSError, match=r".+") as caught:
            function(*arguments)
        assert caught.value.errno == error

    refused(errno.ENOENT, world.sim.request, 99, Op.READ, 0, 0, 512)
    take(world, 0, trouble=None)
    held = world.held[0]
    refused(errno.EINVAL, disk.device.prepare_take, held.image)
    refused(errno.EINVAL, world.disks[1].device.prepare_drop, held.image)
    disk.device.prepare_drop(held.image)
    refused(errno.EBUSY, disk.device.prepare_drop, held.image)
    refused(errno.EBUSY, held.image.close)
    disk.device.cancel()
    refused(errno.EBUSY, held.image.close)
    refused(errno.EBUSY, disk.device.close)
    world.change(0, Op.WRITE, 0, 8)
    refused(errno.EBUSY, world.sim.del_queue, disk.queues[0])
    world.close_gate(0)
    refused(errno.EAGAIN, disk.device.mark, 0, 512)
    world.open_gate(0)
    refused(errno.EINVAL, disk.device.mark, disk.size, 512)
    refused(errno.EINVAL, disk.device.mark, 0, disk.size + 1)
    complete_all(world)
    end(world)


def test_a_switch_is_finished_before_anything_else() -> None:
    world = World(Shape())
    device = world.disks[0].device
    take(world, 0, trouble=None)
    image = world.held[0].image
    device.close_gate()
    device.prepare_drop(image)
    lib.bsu_switch(device.pointer, ffi.NULL)
    for refused in (functools.partial(device.prepare_take, image), image.close):
        with pytest.raises(OSError, match=r".+") as caught:
            refused()
        assert caught.value.errno == errno.EBUSY
    assert image.status[0] is ImageStatus.GONE
    assert lib.bsu_settle(device.pointer) == 0
    image.close()
    device.open_gate()


def test_a_null_device_does_nothing_and_says_so() -> None:
    expected = {Op.READ: 4096, Op.WRITE: 4096, Op.WRITE_ZEROES: 0, Op.DISCARD: 0, Op.FLUSH: 0}
    with Simulator() as sim, engine.Device(size=1 << 20) as device:
        queue = sim.add_queue(sim.add_thread(2 << 20), device=device, depth=4, zero_copy=True)
        data = bytearray(4096)
        for op, result in expected.items():
            sim.request(queue, op, 0, 0, 0 if op is Op.FLUSH else 4096, data)
            assert [ended.result for ended in sim.results()] == [result]
        sim.del_queue(queue)


def test_a_device_without_tracking_and_without_memory_for_trims() -> None:
    page, records = np.zeros(engine.STORAGE_STATE_BYTES, dtype=np.uint8), np.zeros(4096, dtype=np.uint8)
    with Simulator() as sim, engine.Arena() as arena, engine.Storage(page) as storage:
        arena.add(np.zeros(engine.ARENA_PORTION, dtype=np.uint8))
        file = sim.add_file(1 << 20)
        storage.add_area(sim.add_file(8192), 0, 8192, records)
        with engine.Device(size=1 << 20, origin=file, copy_limit_ns=1000) as device:
            queue = sim.add_queue(sim.add_thread(2 << 20), device=device, depth=4, zero_copy=True)
            data = bytearray(b"\x11" * 4096)
            sim.request(queue, Op.WRITE, 0, 4096, 4096, data)
            [io] = sim.started()
            sim.complete(io.id)
            sim.request(queue, Op.DISCARD, 0, 0, 8192)
            [io] = sim.started()
            sim.complete(io.id)
            assert [ended.result for ended in sim.results()] == [4096, 0]
            state = np.zeros(engine.Image.state_bytes(1 << 20), dtype=np.uint8)
            image = engine.Image(device, storage, arena, state, serial=1)
            device.prepare_take(image)
            device.close_gate()
            sim.switch([device], [np.zeros(4096, dtype=np.uint8)])
            device.open_gate()
            sim.request(queue, Op.DISCARD, 0, 0, 8192)
            assert not sim.started(), "a trim is swallowed, and forgotten"
            sim.request(queue, Op.WRITE, 0, 0, 4096, data)
            sim.tick(999)
            assert image.status == ACTIVE
            sim.tick(1)
            assert image.status == (ImageStatus.CORRUPTED, errno.ETIMEDOUT)
            for io in sim.started():
                sim.complete(io.id)
            assert [ended.result for ended in sim.results()] == [0, 4096]
            assert sim.next_swallowed(device, 1 << 20) is None
            sim.del_queue(queue)
            device.prepare_drop(image)
            sim.switch([device], [None])
            image.close()


def test_a_map_of_more_than_one_table() -> None:
    """65536 units belong to one table: writes over its border."""
    world = World(Shape(unit=512, units=65536 + 80, odd_sectors=0, tracking_block=65536))
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 65536 - 3, 7)
    complete_all(world)
    assert [world.held[0].has(65536 + offset) for offset in range(-4, 5)] == [False] + [True] * 7 + [False]
    world.read_image(0, 65536 - 100, 180)
    complete_all(world)
    # claims of leaves that fall into one bucket of the table of claims
    world.change(0, Op.WRITE, 0, 2)
    world.change(1, Op.WRITE, 64 * 256, 2)
    world.change(1, Op.WRITE, 1, 2)
    world.change(1, Op.WRITE, 64 * 256 + 3, 2)
    assert waiting(world) == [Kind.COPY_READ] * 4
    complete_all(world)
    world.change(0, Op.DISCARD, 65536 - 70, 130)
    complete_all(world)
    end(world)


def test_fua_is_for_changes() -> None:
    world = World(Shape())
    world.read(0, 0, 8, Flags.FUA)
    world.change(0, Op.WRITE_ZEROES, 0, 8, Flags.FUA | Flags.NOUNMAP)
    world.change(0, Op.WRITE, 16, 8)
    assert [io.flags for io in world.ios.values()] == [0, Flags.FUA | Flags.NOUNMAP, 0]
    complete_all(world)
    end(world)


def test_a_closed_gate_lets_reads_pass_and_is_still_when_what_passed_it_has_ended() -> None:
    world = World(Shape())
    disk = world.disks[0]
    world.change(0, Op.WRITE, 0, 8)
    world.close_gate(0)
    world.change(1, Op.WRITE, 16, 8)
    world.change(1, Op.DISCARD, 40, 8)
    world.read(0, 0, 8)
    world.flush(1)
    assert waiting(world) == [Kind.CHANGE, Kind.READ, Kind.FLUSH]
    assert not world.still(disk)
    assert not disk.interval.bitmap[0] & 1 << 2, "what waits at the gate belongs to the interval that begins then"
    world.complete(0)
    assert world.still(disk)
    world.open_gate(0)
    assert waiting(world) == [Kind.READ, Kind.FLUSH, Kind.CHANGE, Kind.CHANGE]
    complete_all(world)
    end(world)


def test_one_instant_for_all_members() -> None:
    """B is written on one disk after A had been written on the other: no image has B and not A."""
    world = World(Shape(disks=2))
    per_disk = world.shape.queues
    take(world, 0, 1, trouble=None)
    for first, then in ((0, per_disk), (per_disk, 0)):
        world.change(first, Op.WRITE, 0, 8)
        complete_all(world)
        world.change(then, Op.WRITE, 0, 8)
        complete_all(world)
    for image in range(2):
        world.read_image(image, 0, 1000)
    complete_all(world)
    assert statuses(world) == [ACTIVE, ACTIVE]
    assert all(held.has(0) for held in world.held)
    end(world)


@pytest.mark.parametrize("kind", [Kind.IMAGE_FROM_ORIGIN, Kind.IMAGE_FROM_STORAGE])
def test_an_image_that_goes_stays_for_who_reads_it(kind: Kind) -> None:
    world = World(Shape())
    take(world, 0, trouble=None)
    world.change(0, Op.WRITE, 0, 8)
    complete_all(world)
    world.read_image(0, 0 if kind is Kind.IMAGE_FROM_STORAGE else 8, 8)
    assert waiting(world) == [kind]
    world.close_gate(0)
    assert world.drop(0)
    world.hand_over()
    world.open_gate(0)
    assert world.gone, "its map, and what it names, is in use"
    complete_all(world)
    assert not world.gone
    end(world)


def test_an_image_shows_nothing_before_it_is_taken() -> None:
    world = World(Shape())
    disk, store = world.disks[0], world.stores[0]
    early = Held(world.sim, disk, store, world.arena, 1000)
    queue = world.sim.add_queue(world.threads[0], image=early.image, depth=1, zero_copy=False)
    for other in (False, True):
        if other:
            take(world, 0, trouble=None)
        world.sim.request(queue, Op.READ, 0, 0, 4096, bytearray(4096))
        assert [ended.result for ended in world.sim.results()] == [-errno.EIO]
    world.sim.del_queue(queue)
    early.image.close()
    end(world)


@pytest.mark.parametrize("own", [False, True], ids=["all of it", "what it lacks"])
def test_what_an_older_image_reads_through_a_younger_one_is_handed_over(own: bool) -> None:
    world = World(Shape(units=200, odd_sectors=0))
    take(world, 0, trouble=None)
    if own:
        for unit in (0, 70, 140):
            world.change(0, Op.WRITE, 8 * unit, 8)
        complete_all(world)
    take(world, 0, trouble=None)
    for unit in (0, 1, 70, 71, 140, 199):
        world.change(0, Op.WRITE, 8 * unit, 8)
    complete_all(world)
    places = world.stores[0].used
    world.close_gate(0)
    assert world.drop(1)
    world.open_gate(0)
    world.hand_over()
    assert [unit for unit in range(200) if world.held[0].has(unit)] == [0, 1, 70, 71, 140, 199]
    assert world.stores[0].used == (places - 3 if own else places)
    world.read_image(0, 0, 1600)
    complete_all(world)
    assert statuses(world) == [ACTIVE]
    end(world)
