# SPDX-License-Identifier: MIT
"""What there is in a simulated world: a process with its devices, storages and images, requests and I/O under way."""

from __future__ import annotations

from typing import Any

from blksnap_ublk import engine
from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import SLOT_ZERO, HeldMapMemory, SimBuffers, SimIo, Simulator
from tests.unit.sim.disk import Disk, Request
from tests.unit.sim.held import Held
from tests.unit.sim.shape import Shape
from tests.unit.sim.shared import shared
from tests.unit.sim.store import Store


class Machine:
    """`prompt`: queues run as soon as they are woken; otherwise `run` is a step."""

    def __init__(self, shape: Shape, *, prompt: bool = True) -> None:
        self.shape = shape
        self.prompt = prompt
        self.serial = 0
        self.requests: dict[int, Request] = {}
        self.torn = False
        """Whether death came in the midst of a step: less may be counted than there is."""
        self.starved = not shape.map_memory
        """Whether map memory was ever short."""
        self.buffers: list[SimBuffers] = []
        self.unstored: list[SimBuffers] = []
        """Buffers of dead processes: data may be there and nowhere else."""
        self.flipped = False
        """Whether a test has changed shared state: images may be lost or break, and show nothing wrong."""
        self.begin()
        self.stores = [Store(self.sim, self.shape.unit, areas, n) for n, areas in enumerate(self.shape.storages)]
        self.disks = [Disk(self.sim, shape, self.threads, number) for number in range(shape.disks)]
        self.know_queues()
        self.ns = 1
        self.now = 1
        self.sound = True
        """False from the beginning of a step until its checks are over."""

    def begin(self, *, former: bool = False) -> None:
        """What a process has for itself when it starts, but for storages and devices. `former`: there was another."""
        self.sim = Simulator()
        self.unstored = [*self.unstored, *self.buffers]
        self.buffers = [SimBuffers(self.shape.pool) for _ in range(self.shape.threads) if self.shape.early]
        self.threads: list[int] = [
            self.sim.add_thread(self.shape.pool, self.buffers[n] if self.buffers else None)
            for n in range(self.shape.threads)
        ]
        self.arena = engine.Arena()
        self.portions: list[Any] = []
        """Map memory, as it was added."""
        if self.shape.map_memory and not former:
            self.add_map_memory()
        self.held: list[Held] = []
        """In the order they were taken."""
        self.settling: list[Held] = []
        """Dropped and not yet handed over."""
        self.gone: list[Held] = []
        """Dropped and not yet freed."""
        self.adopted: list[Held] = []
        """Images that a former process had, the oldest first."""
        self.again: list[Held] = []
        """Of these and of `gone`: to be dropped once more."""
        self.left: dict[int, list[Request]] = {}
        """By serial: requests to an image that a former process did not end, and which is not served yet."""
        self.swept = not former
        self.lost: list[int] = []
        """Serials of images that could not be adopted."""
        self.ios: dict[int, SimIo] = {}
        self.applied: set[int] = set()
        self.of_image: dict[int, Held] = {}
        """Of requests of images: which one."""
        self.scarcity: HeldMapMemory | None = None

    def store_unstored(self) -> None:
        """What dead processes had released early is stored."""
        for store in self.stores:
            for buffers in self.unstored:
                buffers.store(store.storage)

    def know_queues(self) -> None:
        """After the queues of the devices were made."""
        self.disk_of_queue = {queue: disk for disk in self.disks for queue in disk.queues}
        self.device_queues = list(self.disk_of_queue)

    def pick(self, io: int) -> SimIo | None:
        """One of the outstanding I/Os."""
        return list(self.ios.values())[io % len(self.ios)] if self.ios else None

    def store_of(self, io: SimIo) -> Store | None:
        """The storage that an I/O goes to, None for an origin."""
        return next((store for store in self.stores if io.file in store.files), None)

    def chain_of_copy(self, io: SimIo) -> list[Held]:
        """Images that a copy is for, oldest first: of one storage if it is written, of all if it is read."""
        if io.request:
            return []
        disk = self.disk_of_queue[io.queue]
        return [
            held for held in self._in_views() if held.disk is disk and (io.op is Op.READ or io.file in held.store.files)
        ]

    def chain(self, held: Held) -> list[Held]:
        """The images of its disk and storage, oldest first; also one that is being handed over."""
        return [other for other in self._in_views() if other.disk is held.disk and other.store is held.store]

    def _in_views(self) -> list[Held]:
        return sorted(self.held + self.settling + self.again, key=lambda held: held.serial)

    def still(self, disk: Disk) -> bool:
        """Whether the gate is closed and nothing that passed it is under way."""
        return disk.gate_closed and disk.device.drained

    def named_places(self, store: Store, but: range = range(0)) -> set[int]:
        """Places that a map of an image has, for other units than `but`."""
        return {
            slot - 1
            for held in self.held + self.gone
            if held.store is store
            for unit in range(self.shape.units)
            if unit not in but
            for slot in (self.sim.slot(held.image, unit), self.sim.written_slot(held.image, unit))
            if 0 < slot < SLOT_ZERO
        }

    def feed(self) -> None:
        """There is enough map memory again."""
        if self.scarcity:
            self.scarcity.close()
            self.scarcity = None
        if not self.arena.total:
            self.add_map_memory()

    def add_map_memory(self) -> None:
        """Adds a portion."""
        self.portions.append(shared(engine.ARENA_PORTION))
        self.arena.add(self.portions[-1])
