# SPDX-License-Identifier: MIT
"""I/O that completes in order, oldest first, but for the one that a fault is for; and map memory that runs out."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from blksnap_ublk.engine.request import Op
from blksnap_ublk.engine.sim import SimIo
from tests.unit.sim.judge import COPY_LIMIT_NS, MAP_LIMIT_NS
from tests.unit.sim.shape import SECTOR
from tests.unit.sim.world import World


class Kind(enum.Enum):
    """Which I/O: by what it is for."""

    COPY_READ = "a copy's read of the origin"
    COPY_WRITE = "a copy's write to the storage"
    CHANGE = "a change of the origin"
    READ = "a device's read of its origin"
    IMAGE_FROM_ORIGIN = "an image's read of the origin"
    IMAGE_WRITE = "an image's write to the storage"
    IMAGE_FROM_STORAGE = "an image's read of the storage"
    FLUSH = "a flush"


def kind_of(world: World, io: SimIo) -> Kind:
    """What an I/O is for."""
    if not io.request:
        return Kind.COPY_READ if io.op is Op.READ else Kind.COPY_WRITE
    if io.request in world.of_image and io.op is Op.WRITE:
        return Kind.IMAGE_WRITE
    if io.request in world.of_image:
        return Kind.IMAGE_FROM_STORAGE if world.store_of(io) else Kind.IMAGE_FROM_ORIGIN
    return Kind.READ if io.op is Op.READ else Kind.FLUSH if io.op is Op.FLUSH else Kind.CHANGE


class Fate(enum.Enum):
    """What becomes of the I/O that the fault is for."""

    ERROR = enum.auto()
    ERROR_AFTER_DATA_MOVED = enum.auto()
    SHORT = enum.auto()
    NOTHING_DONE = enum.auto()
    SILENT = enum.auto()
    """It answers long after every limit; a storage only when the story is over."""


@dataclass
class Fault:
    """The n-th I/O of a kind, counted from 1, does not do as it should."""

    kind: Kind
    number: int
    fate: Fate
    error: int = 0
    seen: int = 0
    silent: set[int] = field(default_factory=set)

    @property
    def met(self) -> bool:
        """Whether there was such an I/O."""
        return self.seen >= self.number


@dataclass
class Shortage:
    """Map memory is used up; it comes back when a request waits for it (`fed`), or never."""

    fed: bool
    met: bool = False


Trouble = Fault | Shortage | None


def flow(world: World, trouble: Trouble = None) -> None:
    """Everything completes; what does not by itself is waited for until the limit has passed."""
    _complete(world, trouble)
    if isinstance(trouble, Fault) and trouble.silent:
        world.tick(COPY_LIMIT_NS)
        _complete(world, trouble)
        # For an origin there is no limit: it does answer in the end.
        trouble.silent = {io for io in trouble.silent if io in world.ios and world.store_of(world.ios[io])}
        _complete(world, trouble)
    while isinstance(trouble, Shortage) and len(world.requests) > sum(store.waiting for store in world.stores):
        trouble.met = True
        if trouble.fed:
            world.feed()
        world.tick(1 if trouble.fed else MAP_LIMIT_NS)
        _complete(world, trouble)


def _complete(world: World, trouble: Trouble) -> None:
    fault = trouble if isinstance(trouble, Fault) else None
    silent = fault.silent if fault else set()
    for _ in range(100_000):
        world.run()
        at = next((n for n, io in enumerate(world.ios.values()) if io.id not in silent), None)
        if at is None:
            return
        io = world.pick(at)
        assert io
        if fault and kind_of(world, io) is fault.kind:
            fault.seen += 1
            if fault.seen == fault.number:
                _befall(world, at, io, fault)
                continue
        world.complete(at)
    raise AssertionError("the I/O never ends")


def _befall(world: World, at: int, io: SimIo, fault: Fault) -> None:
    match fault.fate:
        case Fate.ERROR:
            world.complete(at, error=fault.error)
        case Fate.ERROR_AFTER_DATA_MOVED:
            world.apply(at)
            world.complete(at, error=fault.error)
        case Fate.SHORT:
            world.complete(at, short=io.length // 2 // SECTOR * SECTOR + 1)
        case Fate.NOTHING_DONE:
            world.complete(at, short=0)
        case Fate.SILENT:
            fault.silent.add(io.id)
