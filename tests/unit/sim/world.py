# SPDX-License-Identifier: MIT
"""Disks, storages and images on the simulator, and the model beside them.

Each method that names something to do is a step: it does that and then checks everything that must hold between two
steps. Where a step is not possible it does nothing. Numbers that choose something (a queue, an I/O, a sector) may be
any: what is too large goes round.
"""

from __future__ import annotations

import errno
import functools

import numpy as np
import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import ALL, HeldMapMemory, SimIo, SimResult, Simulator
from tests.unit.sim.disk import WORDS, Disk, Request, filled, stamps
from tests.unit.sim.held import Held, would_break
from tests.unit.sim.shape import SECTOR, Shape
from tests.unit.sim.store import Place, Store

S = 1_000_000_000
COPY_LIMIT_NS = 30 * S
MAP_LIMIT_NS = 5 * S
REPEATED = (errno.EAGAIN, errno.EINTR)


class World:
    """See above. `prompt`: queues run as soon as they are woken; otherwise `run` is a step."""

    def __init__(self, shape: Shape, *, prompt: bool = True) -> None:
        self.shape = shape
        self.prompt = prompt
        self.serial = 0
        self.requests: dict[int, Request] = {}
        self.starved = not shape.map_memory
        """Whether map memory was ever short."""
        self.begin()
        self.disks = [Disk(self.sim, shape, self.threads, number) for number in range(shape.disks)]
        self.know_queues()
        self.ns = 1
        self.now = 1
        self.sound = True
        """False from the beginning of a step until its checks are over."""
        # What happened in the step under way that may break an image.
        self.store_errors: list[tuple[set[int], int]] = []
        self.read_errors: set[tuple[int, int]] = set()
        self.waited: dict[int, int] = {}

    def begin(self) -> None:
        """What a process has for itself when it starts, but for the devices."""
        self.sim = Simulator()
        self.threads = [self.sim.add_thread(self.shape.pool) for _ in range(self.shape.threads)]
        self.arena = engine.Arena()
        if self.shape.map_memory:
            self.add_map_memory()
        self.stores = [Store(self.sim, self.shape.unit, areas) for areas in self.shape.storages]
        self.held: list[Held] = []
        """In the order they were taken."""
        self.settling: list[Held] = []
        """Dropped and not yet handed over."""
        self.gone: list[Held] = []
        """Dropped and not yet freed."""
        self.ios: dict[int, SimIo] = {}
        self.applied: set[int] = set()
        self.readers: dict[int, Held] = {}
        """Of requests of images: which one."""
        self.scarcity: HeldMapMemory | None = None

    def know_queues(self) -> None:
        """After the queues of the devices were made."""
        self.disk_of_queue = {queue: disk for disk in self.disks for queue in disk.queues}
        self.device_queues = list(self.disk_of_queue)

    # ---- requests ----

    def change(self, queue: int, op: Op, start: int, sectors: int, flags: int = 0) -> Request | None:
        """A WRITE, DISCARD or WRITE_ZEROES of a filtered device; `start` in sectors."""
        return self._begin(self._device_queue(queue), op, start, sectors, flags, None)

    def read(self, queue: int, start: int, sectors: int, flags: int = 0) -> Request | None:
        """A READ of a filtered device."""
        return self._begin(self._device_queue(queue), Op.READ, start, sectors, flags, None)

    def flush(self, queue: int) -> Request | None:
        """A FLUSH of a filtered device."""
        return self._begin(self._device_queue(queue), Op.FLUSH, 0, 0, 0, None)

    def read_image(self, image: int, start: int, sectors: int, flags: int = 0) -> Request | None:
        """A READ of an image, dropped ones included; its queue begins with the first."""
        every = self.held + self.gone
        if not every:
            return None
        held = every[image % len(every)]
        if held.queue is None:
            if held in self.gone:
                return None
            thread = self.threads[held.serial % len(self.threads)]
            held.queue = self.sim.add_queue(
                thread, image=held.image, depth=self.shape.depth, zero_copy=self.shape.zero_copy
            )
        return self._begin(held.queue, Op.READ, start, sectors, flags, held)

    def _device_queue(self, queue: int) -> int:
        return self.device_queues[queue % len(self.device_queues)]

    def _begin(self, queue: int, op: Op, start: int, sectors: int, flags: int, reader: Held | None) -> Request | None:
        disk = reader.disk if reader else self.disk_of_queue[queue]
        if op is Op.FLUSH:
            start = sectors = 0
        else:
            start %= disk.count
            # What a transport declares as its largest request fits into one half of the pool.
            sectors = max(1, min(sectors, disk.count - start, self.shape.pool // 2 // SECTOR))
        self._next()
        request = Request(0, queue, op, flags, start * SECTOR, sectors * SECTOR, self.now, self.ns)
        if op is Op.WRITE:
            request.data = filled(stamps(disk.writes + 1, start, sectors))
        elif op is Op.READ:
            request.data = np.zeros((sectors, WORDS), dtype=np.uint64)
        number = self.sim.request(queue, op, flags, request.start, request.length, request.data)
        if number is None:
            self.sound = True
            return None
        self._outstanding(request, number)
        if reader:
            self.readers[number] = reader
        else:
            if op is Op.WRITE:
                request.write = disk.new_write()
            request.parked = request.changes and disk.gate_closed
            disk.submitted(request)
        self.settle()
        return request

    def begin_again(self, request: Request) -> None:
        """The kernel hands a request that a dead process left behind to its successor."""
        self._next()
        number = self.sim.request(request.queue, request.op, request.flags, request.start, request.length, request.data)
        assert number is not None, "a queue has fewer tags than before"
        self._outstanding(request, number)
        request.errors.clear()
        request.parked = False
        request.submitted_ns = self.ns
        self.settle()

    def _outstanding(self, request: Request, number: int) -> None:
        request.id = number
        self.requests[number] = request

    # ---- I/O ----

    def pick(self, io: int) -> SimIo | None:
        """One of the outstanding I/Os."""
        return list(self.ios.values())[io % len(self.ios)] if self.ios else None

    def apply(self, io: int) -> None:
        """The data of an I/O move, it does not complete yet."""
        at = self.pick(io)
        if at and at.id not in self.applied:
            self._next()
            self.applied.add(at.id)
            self.sim.apply(at.id)
            self.settle(origins=True)

    def complete(self, io: int, *, error: int = 0, short: int | None = None) -> None:
        """An I/O completes: with an errno, with `short` bytes, or as it should."""
        at = self.pick(io)
        if not at:
            return
        result = ALL
        if error:
            result = -error
        elif short is not None and at.op in (Op.READ, Op.WRITE) and short < at.length:
            # A sector of the origin is written whole or not at all.
            result = short - short % SECTOR if at.request and at.op is Op.WRITE else short
        self._next()
        del self.ios[at.id]
        self.applied.discard(at.id)
        doomed = would_break(self.chain_of_copy(at), range(at.unit, at.unit + at.units)) if result <= 0 else set()
        store = self.store_of(at)
        if store:
            ended = store.places_of(at)
            store.ending = range(ended.stop - at.units if not at.request else ended.start, ended.stop)
        self.sim.complete(at.id, result)
        started = self._started()
        if store:
            store.ending = range(0)
        if not any(new.again for new in started):
            self._io_ended(at, result, doomed)
        self.settle(origins=True)

    def chain_of_copy(self, io: SimIo) -> list[Held]:
        """Images that a copy is for, oldest first: of one storage if it is written, of all if it is read."""
        if io.request:
            return []
        disk = self.disk_of_queue[io.queue]
        every = sorted(self.held + self.settling, key=lambda other: other.serial)
        return [held for held in every if held.disk is disk and (io.op is Op.READ or io.file in held.store.files)]

    def _io_ended(self, io: SimIo, result: int, doomed: set[int]) -> None:
        failed = result < 0 or (result == 0 and io.op in (Op.READ, Op.WRITE))
        error = errno.EIO if result == 0 or -result in REPEATED else -result
        if io.request:
            if failed:
                self.requests[io.request].errors.append(error)
                if io.request in self.readers and self.store_of(io):
                    self.read_errors.add((self.readers[io.request].serial, error))
        elif io.op is Op.WRITE:
            store = self.store_of(io)
            assert store
            store.write_ended(io)
            if failed:
                self.store_errors.append((doomed, error))
        elif failed and io.length <= self.shape.unit:
            for held in self.chain_of_copy(io):
                held.unreadable.add(io.offset // self.shape.unit)

    def store_of(self, io: SimIo) -> Store | None:
        """The storage that an I/O goes to, None for an origin."""
        return next((store for store in self.stores if io.file in store.files), None)

    def run(self, queue: int | None = None) -> None:
        """A queue that was woken runs, or all of them."""
        self._next()
        self.sim.run(queue)
        self.settle()

    def tick(self, ns: int) -> None:
        """Time passes."""
        self._next()
        self.ns += ns
        for request in self.requests.values():
            if request.changes:
                disk = self.disk_of_queue[request.queue]
                self.waited[disk.number] = max(self.waited.get(disk.number, 0), self.ns - request.submitted_ns)
        self.sim.tick(ns)
        self.settle()

    def fail_data(self) -> None:
        """The next copy of a request's data fails."""
        self.sim.fail_data(errno.EFAULT)

    # ---- instants ----

    def close_gate(self, disk: int) -> None:
        """Changes of this disk wait from now on."""
        at = self.disks[disk % len(self.disks)]
        at.device.close_gate()
        at.gate_closed = True

    def open_gate(self, disk: int) -> None:
        """They go on."""
        at = self.disks[disk % len(self.disks)]
        self._next()
        at.gate_closed = False
        for request in self.requests.values():
            request.parked = request.parked and self.disk_of_queue[request.queue] is not at
        at.device.open_gate()
        self.settle()

    def still(self, disk: Disk) -> bool:
        """Whether the gate is closed and nothing that passed it is under way."""
        return disk.gate_closed and disk.device.drained

    def take(self, members: list[int], store: int) -> bool:
        """One instant for these disks; whether it was possible."""
        disks = list({number % len(self.disks): self.disks[number % len(self.disks)] for number in members}.values())
        if not disks or not all(self.still(disk) for disk in disks) or len(self.held) > 12:
            return False
        self._next()
        bitmaps = []
        for disk in disks:
            self.settle_switch(disk)
            disk.check_bitmap()
            self.serial += 1
            held = Held(self.sim, disk, self.stores[store % len(self.stores)], self.arena, self.serial)
            disk.device.prepare_take(held.image)
            bitmaps.append(disk.new_bitmap())
            held.expected = disk.words.copy()
            self.held.append(held)
        self.sim.switch([disk.device for disk in disks], bitmaps)
        for disk, bitmap in zip(disks, bitmaps, strict=True):
            disk.switched(bitmap, [r for r in self.requests.values() if self.disk_of_queue.get(r.queue) is disk])
        self.settle()
        return True

    def drop(self, image: int) -> bool:
        """An image goes, what older ones need of it is handed over by `portion`; whether it was possible."""
        if not self.held:
            return False
        held = self.held[image % len(self.held)]
        if not self.still(held.disk):
            return False
        self.settle_switch(held.disk)
        self._next()
        held.disk.device.prepare_drop(held.image)
        self.sim.switch([held.disk.device], [None], settle=False)
        self.held.remove(held)
        self.gone.append(held)
        self.settling.append(held)
        self.settle()
        return True

    def portion(self, disk: int) -> None:
        """A part of what follows the drop of an image."""
        at = self.disks[disk % len(self.disks)]
        going = next((held for held in self.settling if held.disk is at), None)
        if going:
            self._next()
            if not self.sim.settle(at.device):
                self.settling.remove(going)
            self.settle()

    def hand_over(self) -> None:
        """All of what follows drops."""
        while self.settling:
            self.portion(self.settling[0].disk.number)

    def settle_switch(self, disk: Disk) -> None:
        """All of it."""
        while self.sim.settle(disk.device):
            pass
        self.settling = [held for held in self.settling if held.disk is not disk]

    def chain(self, held: Held) -> list[Held]:
        """The images of its disk and storage, oldest first; also one that is being handed over."""
        every = sorted(self.held + self.settling, key=lambda other: other.serial)
        return [other for other in every if other.disk is held.disk and other.store is held.store]

    def replay(self, disk: int, most: int) -> bool:
        """A trim that was swallowed is sent; whether there was one and it was possible."""
        at = self.disks[disk % len(self.disks)]
        if not self.still(at) or any(held.disk is at for held in self.held):
            return False
        self._next()
        found = self.sim.next_swallowed(at.device, most)
        if found:
            start, length = found
            at.words[start // SECTOR : (start + length) // SECTOR] = 0
            at.touch(start, length)
        self.settle(origins=True)
        return found is not None

    def mark(self, disk: int, start: int, sectors: int) -> None:
        """Blocks are marked as changed by hand."""
        at = self.disks[disk % len(self.disks)]
        if at.gate_closed:
            return
        start %= at.count
        length = max(1, min(sectors, at.count - start)) * SECTOR
        at.device.mark(start * SECTOR, length)
        at.touch(start * SECTOR, length)

    # ---- room ----

    def grow(self, store: int, units: int) -> None:
        """A storage gets another area."""
        self.stores[store % len(self.stores)].grow(units)

    def damage(self, store: int, place: int, record_byte: int | None = None) -> None:
        """What a storage keeps in a place changes by itself, or what the record says of it."""
        at = self.stores[store % len(self.stores)]
        written = np.flatnonzero(at.places == Place.USED)
        if not len(written):
            return
        chosen = int(written[place % len(written)])
        if record_byte is None:
            at.damage(chosen)
        else:
            at.damage_record(chosen, record_byte)

    def starve(self, pages: int) -> None:
        """Map memory is used up but for a few pages."""
        if not self.scarcity:
            self.scarcity = HeldMapMemory(self.arena, leave=pages)
            self.starved = True

    def feed(self) -> None:
        """There is enough map memory again."""
        if self.scarcity:
            self.scarcity.close()
            self.scarcity = None
        elif not self.arena.total:
            self.add_map_memory()

    def add_map_memory(self) -> None:
        """Adds a portion."""
        self.arena.add(np.zeros(engine.ARENA_PORTION, dtype=np.uint8))

    # ---- what must hold ----

    def _next(self) -> None:
        self.sound = False
        self.now += 1
        self.store_errors.clear()
        self.read_errors.clear()
        self.waited.clear()

    def _started(self) -> list[SimIo]:
        started = self.sim.started()
        for io in started:
            self.ios[io.id] = io
            assert not io.request or not self.requests[io.request].parked, "a change passes the closed gate"
            store = None if io.request else self.store_of(io)
            if store:
                store.write_began(io, functools.partial(self.refers, store))
        return started

    def settle(self, *, origins: bool = False) -> None:
        """Looks at what the step has done, and checks everything; `origins`: their data may have changed."""
        if self.prompt:
            self.sim.run()
        self._started()
        for result in self.sim.results():
            self._ended(result)
        for store in self.stores:
            store.check()
        assert not self.sim.violation, self.sim.violation
        for disk in self.disks if origins else ():
            disk.check()
        for held in self.held:
            self._check_image(held)
        self._free_gone()
        self.sound = True

    def _ended(self, result: SimResult) -> None:
        request = self.requests.pop(result.id)
        held = self.readers.pop(result.id, None)
        success = result.result >= 0
        if success:
            expected = request.length if request.op in (Op.READ, Op.WRITE) else 0
            assert result.result == expected, f"{request.op.name} of {request.length} bytes gave {result.result}"
        if held:
            if success:
                right = held.expected[request.sectors] == request.data
                at = request.start // SECTOR + int(np.flatnonzero(~right.all(axis=1))[0]) if not right.all() else None
                assert at is None, f"image {held.serial}: sector {at} is not its instant"
            else:
                self._justify_image_error(request, held, result)
            return
        if success:
            assert not request.errors, f"{request.op.name} succeeded, its I/O failed: {request.errors}"
        else:
            allowed = [-error for error in request.errors] + ([result.data_error] if result.data_error else [])
            assert result.result in allowed, f"{request.op.name} failed with {result.result}, its I/O with {allowed}"
        disk = self.disk_of_queue[request.queue]
        disk.completed(request, success, self.now)
        if success and request.op is Op.READ:
            assert request.data is not None
            assert (request.data == request.data[:, :1]).all(), "a sector was read torn"
            at = disk.impossible(request.data[:, 0], request.start // SECTOR, request.floor)
            assert at is None, f"disk {disk.number}: sector {at} was read as it cannot be"

    def _justify_image_error(self, request: Request, held: Held, result: SimResult) -> None:
        if result.data_error and result.result == result.data_error:
            return
        if result.result in [-error for error in request.errors]:
            return
        unit = self.shape.unit
        units = range(request.start // unit, (request.start + request.length - 1) // unit + 1)
        broken = held.image.status[0] is not ImageStatus.ACTIVE
        assert result.result == -errno.EIO, f"image {held.serial} failed with {result.result}"
        assert broken or held.unreadable & set(units), f"image {held.serial} can be trusted and gives EIO"

    def _check_image(self, held: Held) -> None:
        status, error = held.image.status
        if status is ImageStatus.ACTIVE:
            chain = self.chain(held)
            held.check(chain[chain.index(held) :])
        elif held.status is ImageStatus.ACTIVE:
            held.status = status
            if (held.serial, error) not in self.read_errors:
                assert (error == errno.ENOSPC) is (status is ImageStatus.OVERFLOWN), f"{status.name} for {error}"
            assert self._may_break(held, error), f"image {held.serial} broke without a reason: {status.name}, {error}"

    def _may_break(self, held: Held, error: int) -> bool:
        waited = self.waited.get(held.disk.number, 0)
        return (
            (error == errno.ENOSPC and held.store.full)
            or (error == errno.ETIMEDOUT and waited >= COPY_LIMIT_NS)
            or (error == errno.ENOMEM and waited >= MAP_LIMIT_NS and self.starved)
            or (error == errno.EBADMSG and bool(held.store.damaged))
            or (held.serial, error) in self.read_errors
            or any(held.serial in doomed and error == reason for doomed, reason in self.store_errors)
        )

    def refers(self, store: Store, place: int) -> bool:
        """Whether a map has this place."""
        return any(
            place + 1 in (self.sim.slot(held.image, unit), self.sim.written_slot(held.image, unit))
            for held in self.held + self.gone
            if held.store is store
            for unit in range(held.disk.shape.units)
        )

    def _free_gone(self) -> None:
        """Images that were dropped are freed when nothing refers to them any more."""
        for held in list(self.gone):
            if any(reader is held for reader in self.readers.values()):
                with pytest.raises(OSError, match="closing an image"):
                    held.image.close()
                continue
            if held.queue is not None:
                self.sim.del_queue(held.queue)
                held.queue = None
            if held in self.settling:
                continue
            if held.image.idle:
                held.image.close()
                self.gone.remove(held)
