# SPDX-License-Identifier: MIT
"""Disks, storages and images on the simulator, and the model beside them.

Each method that names something to do is a step: it does that and then checks everything that must hold between two
steps. Where a step is not possible it does nothing. Numbers that choose something (a queue, an I/O, a sector) may be
any: what is too large goes round.
"""

from __future__ import annotations

import errno

import numpy as np

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import ALL, HeldMapMemory, SimIo
from tests.unit.sim.aftermath import Aftermath
from tests.unit.sim.disk import WORDS, Request, filled, stamps
from tests.unit.sim.held import Held
from tests.unit.sim.shape import SECTOR
from tests.unit.sim.store import Place

REPEATED = (errno.EAGAIN, errno.EINTR)


class World(Aftermath):
    """See above."""

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
        """A READ of an image, dropped ones included; its queue begins with the first request."""
        return self._begin_image(image, Op.READ, start, sectors, flags)

    def write_image(self, image: int, op: Op, start: int, sectors: int, flags: int = 0) -> Request | None:
        """A WRITE or WRITE_ZEROES of an image."""
        return self._begin_image(image, op, start, sectors, flags)

    def _begin_image(self, image: int, op: Op, start: int, sectors: int, flags: int) -> Request | None:
        every = self.held + self.gone
        if not every:
            return None
        held = every[image % len(every)]
        if held.queue is None:
            if held in self.gone or (held in self.adopted and not self.swept):
                return None
            thread = self.threads[held.serial % len(self.threads)]
            held.queue = self.sim.add_queue(
                thread, image=held.image, depth=self.shape.depth, zero_copy=self.shape.zero_copy
            )
            for request in self.left.pop(held.serial, []):
                request.queue = held.queue
                self.begin_again(request, held)
        return self._begin(held.queue, op, start, sectors, flags, held)

    def _device_queue(self, queue: int) -> int:
        return self.device_queues[queue % len(self.device_queues)]

    def _begin(self, queue: int, op: Op, start: int, sectors: int, flags: int, held: Held | None) -> Request | None:
        disk = held.disk if held else self.disk_of_queue[queue]
        if op is Op.FLUSH:
            start = sectors = 0
        else:
            start %= disk.count
            # What a transport declares as its largest request fits into one half of the pool.
            sectors = max(1, min(sectors, disk.count - start, self.shape.pool // 2 // SECTOR))
        self.next_step()
        request = Request(0, queue, op, flags, start * SECTOR, sectors * SECTOR, self.now, self.ns)
        if op is Op.WRITE:
            request.write = held.new_write() if held else disk.writes + 1
            request.data = filled(stamps(request.write, start, sectors))
        elif op is Op.READ:
            request.data = np.zeros((sectors, WORDS), dtype=np.uint64)
        number = self.sim.request(queue, op, flags, request.start, request.length, request.data)
        if number is None:
            self.sound = True
            return None
        self._outstanding(request, number)
        if held:
            self._begun_of_image(request, held)
        else:
            if op is Op.WRITE:
                disk.new_write()
            request.parked = request.changes and disk.gate_closed
            disk.submitted(request)
        self.settle()
        return request

    def _begun_of_image(self, request: Request, held: Held) -> None:
        self.of_image[request.id] = held
        held.content.begins(request)
        if request.changes:
            given = held.store.unused_before - held.store.unused
            assert given <= 0 or held.store.unused >= held.store.kept, "an image is written where copies would go"
            for interval in held.intervals:
                interval.touch(request.start, request.length)

    def begin_again(self, request: Request, held: Held | None = None) -> None:
        """The kernel hands a request that a dead process left behind to its successor; `held`: the image it is for."""
        self.next_step()
        number = self.sim.request(request.queue, request.op, request.flags, request.start, request.length, request.data)
        assert number is not None, "a queue has fewer tags than before"
        self._outstanding(request, number)
        if held:
            self.of_image[number] = held
            held.content.begins_again(request)
        request.errors.clear()
        request.parked = False
        request.submitted_ns = self.ns
        self.settle()

    def _outstanding(self, request: Request, number: int) -> None:
        request.id = number
        self.requests[number] = request

    # ---- I/O ----

    def apply(self, io: int) -> None:
        """The data of an I/O move, it does not complete yet."""
        at = self.pick(io)
        if at and at.id not in self.applied:
            self.next_step()
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
        self.next_step()
        del self.ios[at.id]
        self.applied.discard(at.id)
        doomed = self.doomed(at) if result <= 0 else set()
        del self.since[at.id]
        self.sim.complete(at.id, result)
        started = self.sim.started()
        if not any(new.again for new in started):
            self._io_ended(at, result, doomed)
        self.know(started)
        self.settle(origins=True)

    def _io_ended(self, io: SimIo, result: int, doomed: set[int]) -> None:
        failed = result < 0 or (result == 0 and io.op in (Op.READ, Op.WRITE))
        error = errno.EIO if result == 0 or -result in REPEATED else -result
        store = self.store_of(io)
        if store and io.op is Op.WRITE:
            store.write_ended(io)
        if io.request:
            request = self.requests.get(io.request)  # None: it was given up
            if failed and request:
                request.errors.append(error)
                if store and io.op is Op.READ:
                    self.read_errors.add((self.of_image[io.request].serial, error))
        elif io.op is Op.WRITE:
            if failed:
                self.store_errors.append((doomed, error))
        elif failed and io.length <= self.shape.unit:
            for held in self.chain_of_copy(io):
                held.unreadable.add(io.offset // self.shape.unit)

    def run(self, queue: int | None = None) -> None:
        """A queue that was woken runs, or all of them."""
        self.next_step()
        self.sim.run(queue)
        self.settle()

    def tick(self, ns: int) -> None:
        """Time passes."""
        self.next_step()
        self.ticks = True
        self.ns += ns
        self.measure_waits()
        self.sim.tick(ns)
        self.settle()

    def pass_time(self, ns: int) -> None:
        """Time passes between two ticks of the queues."""
        self.next_step()
        self.ns += ns
        self.sim.pass_time(ns)
        self.settle()

    def fail_data(self) -> None:
        """The next copy of a request's data fails."""
        self.sim.fail_data(errno.EFAULT)

    # ---- room ----

    def grow(self, store: int, units: int) -> None:
        """A storage gets another area."""
        self.next_step()
        self.stores[store % len(self.stores)].grow(units)
        self.settle()

    def set_room(self, store: int, wait_ms: int, low: int = 0) -> None:
        """How long writers wait for room in a storage, and when few of its places are left."""
        self.next_step()
        self.stores[store % len(self.stores)].set_room(wait_ms=wait_ms, low=low)
        self.settle()

    def set_rate(self, store: int, rate: int) -> None:
        """Bytes that copies may put into a storage in a second, 0: any."""
        self.next_step()
        self.stores[store % len(self.stores)].storage.set_rate(rate)
        self.settle()

    def forsake(self, image: int) -> None:
        """An image is broken by hand."""
        if self.held:
            held = self.held[image % len(self.held)]
            self.next_step()
            self.forsaken.add(held.serial)
            held.image.break_(ImageStatus.CORRUPTED, errno.ECANCELED)
            self.settle()

    def damage(self, store: int, place: int, record_byte: int | None = None, *, byte: int = 0) -> None:
        """What a storage keeps in a place changes by itself, or what the record says of it."""
        at = self.stores[store % len(self.stores)]
        written = np.flatnonzero(at.places == Place.USED)
        if not len(written):
            return
        chosen = int(written[place % len(written)])
        if record_byte is None:
            at.damage(chosen, byte)
        else:
            at.damage_record(chosen, record_byte)

    def starve(self, pages: int) -> None:
        """Map memory is used up but for a few pages."""
        if not self.scarcity:
            self.scarcity = HeldMapMemory(self.arena, leave=pages)
            self.starved = True
