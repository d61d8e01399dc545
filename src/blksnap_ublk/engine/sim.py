# SPDX-License-Identifier: MIT
"""The scripted executor: devices and images on byte arrays, where the caller decides the order and result of every I/O.

For tests. Nothing happens by itself: I/O that the core submits waits for `complete`, queues that were woken wait for
`run`, the clock waits for `tick`.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.device import Device
from blksnap_ublk.engine.file import File
from blksnap_ublk.engine.handle import Handle, Pinned, check
from blksnap_ublk.engine.image import Image
from blksnap_ublk.engine.request import Flags, Op
from blksnap_ublk.engine.storage import Arena, Storage

ALL = 2**31 - 1
"""Result of an I/O that did everything."""

NEED_COPY: int = lib.BSU_NEED_COPY
"""Flag of a request whose pages cannot be used in place."""

SLOT_BAD = 2**32 - 1
"""What a map has for a unit that could not be read."""

SLOT_ZERO = 2**32 - 4
"""What the map of what was written to an image has for a unit of zeroes."""

_MOST = 256


class SimIo(NamedTuple):
    """An I/O that the core submitted. `request`: whose, 0 for a copy; `unit`, `units`: what a copy preserves.

    `again`: the rest of one that was short, or a repetition.
    """

    id: int
    request: int
    offset: int
    length: int
    unit: int
    units: int
    file: int
    queue: int
    op: Op
    flags: Flags
    again: bool


class SimResult(NamedTuple):
    """A completed request: bytes or a negative errno; `data_error`: what `fail_data` did to it."""

    id: int
    result: int
    queue: int
    data_error: int


class SimFile(File):
    """A byte array. `data` is what it holds at the moment; valid as long as its simulator."""

    def __init__(self, sim: Simulator, index: int, size: int) -> None:
        Handle.__init__(self, lib.bsu_sim_file(sim.pointer, index))
        self.index = index
        self.data: Any = ffi.buffer(lib.bsu_sim_data(sim.pointer, index), size)

    def _free(self, pointer: Any) -> None:
        """Freed with its simulator."""


class SimBuffers:
    """Memory of a pool of `pool_bytes` that outlives the simulator."""

    def __init__(self, pool_bytes: int) -> None:
        self._maps = [mmap.mmap(-1, size) for size in (lib.bsu_pool_unstored_bytes(pool_bytes), pool_bytes)]
        self.unstored, self.memory = (ffi.from_buffer(each) for each in self._maps)
        self._half = pool_bytes // 2

    def close(self) -> None:
        """After the simulator that uses it."""
        ffi.release(self.unstored)
        ffi.release(self.memory)
        for each in self._maps:
            each.close()

    def store(self, storage: Storage) -> int:
        """Puts what was released early for `storage`, and not stored, at its places. How many units."""
        return int(lib.bsu_sim_store_unstored(storage.pointer, self.unstored, self.memory + self._half, self._half))


class Simulator(Handle):
    """Files, threads (pools of buffers) and queues. To be closed after its queues are deleted, their devices closed."""

    _name = "simulator"

    def __init__(self) -> None:
        super().__init__(lib.bsu_sim_new())
        self._ios = ffi.new("struct bsu_sim_io[]", _MOST)
        self._results = ffi.new("struct bsu_sim_result[]", _MOST)

    def add_file(self, size: int) -> SimFile:
        """A file of `size` zeroes."""
        return SimFile(self, check(lib.bsu_sim_add_file(self.pointer, size), "simulated file"), size)

    def add_thread(self, pool_bytes: int, buffers: SimBuffers | None = None) -> int:
        """A pool that queues share; its index. At least 2 MiB. With `buffers`, writes do not wait for storages."""
        parts = (ffi.NULL, ffi.NULL) if buffers is None else (buffers.unstored, buffers.memory)
        return check(lib.bsu_sim_add_thread(self.pointer, pool_bytes, *parts), "simulated thread")

    def pool_used(self, thread: int) -> int:
        """Bytes of the pool handed out at the moment."""
        return int(lib.bsu_sim_pool_used(self.pointer, thread))

    def add_queue(
        self, thread: int, *, device: Device | None = None, image: Image | None = None, depth: int, zero_copy: bool
    ) -> int:
        """A queue of the device or of the image; its index."""
        served = [ffi.NULL if part is None else part.pointer for part in (device, image)]
        return check(lib.bsu_sim_add_queue(self.pointer, thread, *served, depth, zero_copy), "simulated queue")

    def del_queue(self, queue: int) -> None:
        """OSError(EBUSY) while it is not idle."""
        check(lib.bsu_sim_del_queue(self.pointer, queue), "deleting a simulated queue")

    def request(self, queue: int, op: int, flags: int, start: int, length: int, data: Any = None) -> int | None:
        """Starts a request, returns its id; None when all tags are taken. `data`: writable, kept until it has ended."""
        memory = ffi.NULL if data is None else ffi.from_buffer(data)
        result = int(lib.bsu_sim_request(self.pointer, queue, op, flags, start, length, memory))
        return None if result == -errno.EBUSY else check(result, "request")

    def results(self) -> list[SimResult]:
        """Requests completed since the last call."""
        found = []
        while count := lib.bsu_sim_results(self.pointer, self._results, _MOST):
            for index in range(count):
                at = self._results[index]
                found.append(SimResult(at.id, at.res, at.queue, at.data_error))
        return found

    def started(self) -> list[SimIo]:
        """I/O submitted since the last call and not completed, oldest first."""
        found = []
        while count := lib.bsu_sim_started(self.pointer, self._ios, _MOST):
            for index in range(count):
                at = self._ios[index]
                found.append(
                    SimIo(
                        at.id,
                        at.request,
                        at.offset,
                        at.length,
                        at.unit,
                        at.units,
                        at.file,
                        at.queue,
                        Op(at.op),
                        Flags(at.flags),
                        bool(at.again),
                    )
                )
        return found

    def apply(self, io: int) -> None:
        """The data of an I/O move now; `complete` follows. OSError(EALREADY) the second time."""
        check(lib.bsu_sim_apply(self.pointer, io), "applying an I/O")

    def complete(self, io: int, result: int = ALL) -> None:
        """Completes an I/O: a negative errno (data not moved unless applied), a short count, or ALL."""
        check(lib.bsu_sim_complete(self.pointer, io, result), "completing an I/O")

    def fail_data(self, error: int) -> None:
        """The next copy of data to or from a request fails with this errno."""
        lib.bsu_sim_fail_data(self.pointer, -error)

    def woken(self, queue: int) -> bool:
        """Whether the queue has something to run."""
        return bool(lib.bsu_sim_woken(self.pointer, queue))

    def run(self, queue: int | None = None) -> None:
        """A queue that was woken runs; without `queue` all of them, until none is woken."""
        if queue is None:
            lib.bsu_sim_run(self.pointer)
        else:
            lib.bsu_sim_run_queue(self.pointer, queue)

    def tick(self, ns: int) -> None:
        """Moves the clock, and lets all queues look at it."""
        lib.bsu_sim_tick(self.pointer, ns)

    def pass_time(self, ns: int) -> None:
        """Moves the clock between two ticks: queues that asked for a time that has come are woken."""
        lib.bsu_sim_pass(self.pointer, ns)

    def notified(self) -> int:
        """How often the core notified the control side since the last call."""
        return int(lib.bsu_sim_notified(self.pointer))

    def switch(self, devices: Sequence[Device], bitmaps: Sequence[Any], *, settle: bool = True) -> None:
        """Switches prepared devices whose gates are closed and drained; `bitmaps` as in `engine.switch_all`.

        What follows the switch is done as well, or left to `settle`.
        """
        for device, bitmap in zip(devices, bitmaps, strict=True):
            pinned = None if bitmap is None else Pinned(bitmap)
            lib.bsu_switch(device.pointer, ffi.NULL if pinned is None else pinned.pointer)
            device.switched(pinned)
        for device in devices if settle else ():
            while self.settle(device):
                pass

    @staticmethod
    def settle(device: Device) -> bool:
        """A portion of what follows a switch; whether there is more."""
        result = int(lib.bsu_settle(device.pointer))
        if result < 0:
            raise AssertionError("one thread, and it is in the core and here")
        if not result:
            device.settled()
        return bool(result)

    @staticmethod
    def next_swallowed(device: Device, most: int) -> tuple[int, int] | None:
        """Start and length of the next swallowed trim, at most `most` bytes; it is forgotten. None: there is none."""
        start, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        if not lib.bsu_device_next_swallowed(device.pointer, most, start, length):
            return None
        return int(start[0]), int(length[0])

    @property
    def violation(self) -> str:
        """The first rule of csrc/sim/watch.c that the core broke; empty if none."""
        return str(ffi.string(lib.bsu_sim_violation(self.pointer)).decode())

    @staticmethod
    def slot(image: Image, unit: int) -> int:
        """What the image's own map has for a unit: 0, a place plus one, or SLOT_BAD."""
        return int(lib.bsu_sim_slot(image.pointer, unit))

    @staticmethod
    def written_slot(image: Image, unit: int) -> int:
        """What the map of what was written to the image has for a unit: also SLOT_ZERO."""
        return int(lib.bsu_sim_written_slot(image.pointer, unit))

    @staticmethod
    def place_used(storage: Storage, place: int) -> bool:
        """Whether a place is given out at the moment."""
        return bool(lib.bsu_sim_place_used(storage.pointer, place))

    @staticmethod
    def first_wrong(image: Image, expected: Any, start: int = 0) -> int | None:
        """First unit from `start` on where the image, at this moment, would not give `expected` (all of the device)."""
        unit = int(lib.bsu_sim_first_wrong(image.pointer, ffi.from_buffer(expected), start))
        return None if unit == -errno.ENOENT else unit

    def kill(self, devices: Sequence[Device], images: Sequence[Image], parts: Sequence[Handle]) -> None:
        """kill -9 of the process that has all of these: nothing of it runs any more, shared memory stays as it is.

        `parts`: storages, arenas, sweeps.
        """
        lib.bsu_sim_kill(_killed(self))
        for image in images:
            lib.bsu_sim_kill_image(_killed(image))
        for device in devices:
            lib.bsu_sim_kill_device(_killed(device))
        for part in parts:
            part._free(_killed(part))

    @staticmethod
    @contextmanager
    def map_locked(image: Image) -> Iterator[None]:
        """Others cannot add tables and leaves to the map of what was preserved. By one thread."""
        lib.bsu_sim_lock_map(image.pointer)
        try:
            yield
        finally:
            lib.bsu_sim_unlock_map(image.pointer)

    @staticmethod
    def unpublish(image: Image, unit: int, slot: int, *, written: bool) -> None:
        """Puts back what a map had for a unit, as if death had come before: `kill` follows."""
        lib.bsu_sim_unpublish(image.pointer, written, unit, slot)

    def _free(self, pointer: Any) -> None:
        lib.bsu_sim_free(pointer)


class HeldMapMemory(Handle):
    """All free pages of an arena but `leave`, until given back."""

    _name = "hold on map memory"

    def __init__(self, arena: Arena, *, leave: int) -> None:
        super().__init__(lib.bsu_sim_hold_map(arena.pointer, leave))

    def give_back(self, pages: int) -> int:
        """Returns how many are still held."""
        return int(lib.bsu_sim_give_map(self.pointer, pages))

    def _free(self, pointer: Any) -> None:
        lib.bsu_sim_free_held(pointer)


def _killed(part: Handle) -> Any:
    """Its C object, which it has no longer."""
    pointer, part._pointer = part.pointer, None
    return pointer


def exit_at_change(memory: Sequence[Any], number: int, status: int) -> None:
    """This process ends with `status` when it is about to change some of `memory` for the `number`-th time, from 0.

    `memory`: whole pages. OSError(ENOTSUP) where the processor does not let a process count that.
    """
    parts = [ffi.from_buffer(each, require_writable=True) for each in memory]
    regions = ffi.new("struct bsu_sim_region[]", [(part, len(part)) for part in parts])
    check(lib.bsu_sim_exit_at_change(regions, len(parts), number, status), "counting changes of memory")


def set_mutant(number: int) -> None:
    """Chooses a seeded bug, 0 for none. OSError(ENOTSUP) in a build that has none."""
    check(lib.bsu_sim_set_mutant(number), "seeded bugs")
