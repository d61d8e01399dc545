# SPDX-License-Identifier: MIT
"""What must hold in a simulated world between any two steps."""

from __future__ import annotations

import errno
import functools

import pytest

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import SimIo, SimResult
from tests.unit.sim.disk import Request
from tests.unit.sim.held import Held, would_break
from tests.unit.sim.machine import Machine
from tests.unit.sim.shape import SECTOR, Shape
from tests.unit.sim.store import Store

S = 1_000_000_000
COPY_LIMIT_NS = 30 * S
MAP_LIMIT_NS = 5 * S


def units_of(request: Request, unit: int) -> range:
    """What it touches."""
    return range(request.start // unit, (request.start + request.length - 1) // unit + 1)


class Judge(Machine):
    """Knows what has happened in the step under way, and whether that is a reason for what it sees."""

    def __init__(self, shape: Shape, *, prompt: bool = True) -> None:
        super().__init__(shape, prompt=prompt)
        self.store_errors: list[tuple[set[int], int]] = []
        """Of copies: serials of the images that lack their units, and why."""
        self.read_errors: set[tuple[int, int]] = set()
        """Of images' reads from storage: serial, and why."""
        self.waited: dict[int, int] = {}
        """Of each disk: how long a request of it has waited at most."""
        self.since: dict[int, int] = {}
        """Of I/O: when it was submitted, in ns."""
        self.told_in_step = 0
        """How often control was told something in the last step."""
        self.ticks = False
        """Whether time passes in this step: places may go back in the midst of it."""
        self.forsaken: set[int] = set()
        """Serials of images that a test has broken by hand."""

    def next_step(self) -> None:
        """A step begins."""
        self.sound = False
        self.now += 1
        self.store_errors.clear()
        self.read_errors.clear()
        self.waited.clear()
        self.measure_waits()
        self.ticks = False
        for store in self.stores:
            store.unused_before = store.unused
        for held in self.held:
            held.content.next_step()

    def measure_waits(self) -> None:
        """How long requests of each disk have waited by now."""
        for request in self.requests.values():
            if request.changes and request.id not in self.of_image:
                number = self.disk_of_queue[request.queue].number
                self.waited[number] = max(self.waited.get(number, 0), self.ns - request.submitted_ns)

    def doomed(self, io: SimIo) -> set[int]:
        """Serials of the images that break if this copy fails: those that lack its units, or read them from it."""
        chain = self.chain_of_copy(io)
        lacking = would_break(chain, range(io.unit, io.unit + io.units))
        store = self.store_of(io) if io.op is Op.WRITE and not io.request else None
        if store is None:
            return lacking
        first = store.places_of(io).stop - io.units
        reading = {
            held.serial
            for unit in range(io.units)
            for n, held in enumerate(chain)
            if next((slot for other in chain[n:] if (slot := self.sim.slot(other.image, io.unit + unit))), 0)
            == first + unit + 1
        }
        return lacking | reading

    def know(self, started: list[SimIo]) -> None:
        """I/O that has been submitted."""
        for io in started:
            self.ios[io.id] = io
            self.since.setdefault(io.id, self.ns)
            assert not io.request or not self.requests[io.request].parked, "a change passes the closed gate"
            store = self.store_of(io) if io.op is Op.WRITE else None
            if store:
                store.write_began(io, functools.partial(self._names, store, self._published_by(io)))
                self._check_readers(store, io)
                self._check_exempt(io)

    def _published_by(self, write: SimIo) -> range:
        """Units that are published when this write begins: early release."""
        return range(write.unit, write.unit + write.units) if self.shape.early and not write.request else range(0)

    def _names(self, store: Store, but: range, place: int) -> bool:
        return place in self.named_places(store, but)

    def _check_readers(self, store: Store, write: SimIo) -> None:
        places = store.places_of(write)
        for io in self.ios.values():
            if io.op is not Op.READ or self.store_of(io) is not store:
                continue
            read = store.places_of(io)
            reader = self.of_image.get(io.request)  # None: it was given up
            trusted = reader is not None and reader.image.status[0] is ImageStatus.ACTIVE
            under = trusted and read.start < places.stop and places.start < read.stop
            assert not under, f"a place is written under a reader: {write.offset} of file {write.file}"

    def _check_exempt(self, write: SimIo) -> None:
        """What no image needs is not preserved."""
        chain = self.chain_of_copy(write)
        if not chain or not all(held.active for held in chain):
            return
        for unit in range(write.unit, write.unit + write.units):
            assert any(unit not in held.exempt for held in chain), f"unit {unit} is exempt, and was preserved"

    def settle(self, *, origins: bool = False) -> None:
        """Looks at what the step has done, and checks everything; `origins`: their data may have changed."""
        if self.prompt:
            self.sim.run()
        self.know(self.sim.started())
        assert not self.sim.violation, self.sim.violation
        for held in self.held:
            self._check_image(held)
        for result in self.sim.results():
            self._ended(result)
        notified = self.told_in_step = self.sim.notified()
        for store in self.stores:
            store.check()
            self._check_room(store, notified)
        self._check_who_waits()
        for disk in self.disks if origins else ():
            disk.check()
        self._free_gone()
        self.sound = True

    def _check_room(self, store: Store, notified: int) -> None:
        """Somebody waits only where all places are given out, and control hears of that before it comes to it."""
        if store.waiting:
            room = max(0, store.unused - store.kept) if self._image_changes(store) else store.unused
            assert store.wait_ns, "a request waits for room that nobody will make"
            assert not room, "a request waits for room, and there is some"
        fewer = store.unused < min(store.low, store.unused_before)
        mixed = any(io.op is Op.WRITE and io.request and store is self.store_of(io) for io in self.ios.values())
        assert not fewer or mixed or store.told or notified, "nobody was told that there is little room"
        store.told = store.told or bool(notified)

    def _check_who_waits(self) -> None:
        """Of each device it is known whether its gate would not drain for want of room."""
        for disk in self.disks:
            if disk.device.waits_for_room:
                assert any(request.changes for request in self.requests.values()), "nobody is there who could wait"
        waits = any(disk.device.waits_for_room for disk in self.disks)
        assert not waits or any(store.waiting for store in self.stores), "a device waits for room, no storage is full"
        for store in self.stores:
            assert waits or not store.waiting or self._image_changes(store), "it is not known who waits for room"

    def _image_changes(self, store: Store) -> bool:
        """Whether somebody writes to an image of that storage."""
        return any(held.store is store and self.requests[number].changes for number, held in self.of_image.items())

    def _ended(self, result: SimResult) -> None:
        request = self.requests.pop(result.id)
        held = self.of_image.pop(result.id, None)
        request.result = result.result
        success = result.result >= 0
        if success:
            expected = request.length if request.op in (Op.READ, Op.WRITE) else 0
            assert result.result == expected, f"{request.op.name} of {request.length} bytes gave {result.result}"
        if held:
            self._image_request_ended(request, held, result)
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

    def _image_request_ended(self, request: Request, held: Held, result: SimResult) -> None:
        if request.op is Op.FLUSH:
            assert result.result == 0, "a flush of an image fails"
            return
        held.content.ends(request)
        trusted = held.image.status[0] is ImageStatus.ACTIVE
        if result.result < 0:
            self._justify_image_error(request, held, result)
        elif request.op is Op.READ:
            if not trusted and held.content.changing:
                return
            at = held.content.misread(request)
            assert at is None, f"image {held.serial}: sector {at} was read as it cannot be"
        elif trusted:
            at = held.content.unwritten(request)
            assert at is None, f"image {held.serial}: sector {at} was not written, and that was said"

    def _justify_image_error(self, request: Request, held: Held, result: SimResult) -> None:
        if result.data_error and result.result == result.data_error:
            return
        if result.result in [-error for error in request.errors]:
            return
        if request.changes and result.result == -errno.ENOSPC:
            slow = self.starved and self.ns - request.submitted_ns >= MAP_LIMIT_NS
            assert slow or self._may_lack_room(request, held), f"image {held.serial}: there was room to write"
            waited = slow or self.ns - request.submitted_ns >= held.store.wait_ns
            assert waited, f"image {held.serial}: room was to be waited for"
            return
        units = units_of(request, self.shape.unit)
        broken = held.image.status[0] is not ImageStatus.ACTIVE
        if result.result == -errno.EIO and self.ns - request.submitted_ns >= COPY_LIMIT_NS:
            return
        assert result.result == -errno.EIO, f"image {held.serial} failed with {result.result}"
        assert broken or held.unreadable & set(units), f"image {held.serial} can be trusted and gives EIO"

    def _may_lack_room(self, request: Request, held: Held) -> bool:
        """Other changes of images may have had places in this step that they have given back since."""
        store = held.store
        others = [other for other in self.requests.values() if other.id in self.of_image and other.changes]
        passing = sum(other.length // store.unit + 2 for other in others if self.of_image[other.id].store is store)
        return min(store.unused_before, store.unused) - passing <= store.kept

    def _check_image(self, held: Held) -> None:
        if self.flipped and not self.swept:
            return
        status, error = held.image.status
        if status is ImageStatus.ACTIVE:
            chain = self.chain(held)
            if self.flipped:
                held.unreadable |= set(range(self.shape.units))
            held.check(chain[chain.index(held) :])
        elif held.status is ImageStatus.ACTIVE:
            held.status = status
            full = status is ImageStatus.OVERFLOWN
            assert not full or error == errno.ENOSPC, f"{status.name} for {error}"
            allowed = (self.flipped or self._may_overflow(held)) if full else self._may_break(held, error)
            assert allowed, f"image {held.serial} broke without a reason: {status.name}, {error}"

    def _may_overflow(self, held: Held) -> bool:
        """There was no room in its storage for a unit that it lacks, and for as long as is to be waited for it."""
        store = held.store
        if store.unused and store.unused_before and not self.ticks:
            return False
        for request in self.requests.values():
            if request.id in self.of_image or request.op not in (Op.WRITE, Op.WRITE_ZEROES) or request.parked:
                continue
            if self.disk_of_queue[request.queue] is not held.disk:
                continue
            if self.ns - request.submitted_ns >= store.wait_ns and held.serial in would_break(
                self.chain(held), units_of(request, self.shape.unit)
            ):
                return True
        return False

    def _is_silent(self, store: Store) -> bool:
        """Whether a write to it may have been given up that has not ended."""
        return any(
            io.op is Op.WRITE and store is self.store_of(io) and self.ns - self.since[io.id] >= COPY_LIMIT_NS
            for io in self.ios.values()
        )

    def _may_break(self, held: Held, error: int) -> bool:
        waited = self.waited.get(held.disk.number, 0)
        return (
            self.flipped
            or held.serial in self.forsaken
            or (error == errno.ETIMEDOUT and (waited >= COPY_LIMIT_NS or self._is_silent(held.store)))
            or (error == errno.ENOMEM and waited >= MAP_LIMIT_NS and self.starved)
            or (error == errno.EBADMSG and bool(held.store.damaged))
            or (held.serial, error) in self.read_errors
            or any(held.serial in doomed and error == reason for doomed, reason in self.store_errors)
        )

    def _free_gone(self) -> None:
        """Images that were dropped are freed when nothing refers to them any more."""
        for held in list(self.gone):
            if held in self.again:
                continue
            given_up = held.queue is not None and any(io.queue == held.queue for io in self.ios.values())
            if given_up or any(reader is held for reader in self.of_image.values()):
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
