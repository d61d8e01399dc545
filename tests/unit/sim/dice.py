# SPDX-License-Identifier: MIT
"""Steps by the roll of a seeded die: fast, for many steps; what a seed does never depends on anything else."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from blksnap_ublk.engine.request import Flags, Op
from blksnap_ublk.engine.sim import NEED_COPY, SimIo
from tests.unit.sim.death import die as death
from tests.unit.sim.ending import end
from tests.unit.sim.judge import S
from tests.unit.sim.shape import GEOMETRIES, SECTOR, STORAGES, TWO_TABLES, Shape
from tests.unit.sim.shared import dies
from tests.unit.sim.torn import Cut, outliving
from tests.unit.sim.world import World

CHANGES = (Op.WRITE,) * 6 + (Op.WRITE_ZEROES, Op.DISCARD)
IMAGE_CHANGES = (Op.WRITE,) * 4 + (Op.WRITE_ZEROES,)
FLAGS = (0, 0, 0, 0, Flags.FUA, NEED_COPY, Flags.FUA | NEED_COPY)
MOST_PORTIONS = 12
"""Each death adds one, and takes longer with each."""

LONG_NS = 10 * S
"""Longer waits for room end with the world."""

ERRORS = (errno.EIO, errno.ENOSPC, errno.EAGAIN, errno.EINTR, errno.EREMOTEIO)


def small_storages(die: random.Random) -> tuple[tuple[int, ...], ...]:
    """One to three of up to three areas each, of a few units."""
    return tuple(tuple(die.randrange(1, 9) for _ in range(die.randrange(4))) for _ in range(die.randrange(1, 4)))


class Dice:
    """A world and what is thrown for it."""

    def __init__(self, seed: int) -> None:
        die = self.die = random.Random(seed)
        tame = die.random() < 0.5
        large = die.random() < 0.004
        self.many = 3 if large else die.choice((1, 4, 14))
        """How many images are held at once."""
        self.world = World(
            Shape(
                **(TWO_TABLES if large else die.choice(GEOMETRIES[:6] if die.random() < 0.9 else GEOMETRIES)),
                disks=die.choice((1, 1, 2)),
                threads=die.choice((1, 2)),
                queues=die.choice((1, 2, 3)),
                depth=die.choice((1, 4, 12)),
                zero_copy=die.random() < 0.5,
                storages=die.choice(STORAGES) if die.random() < 0.7 else small_storages(die),
                map_memory=die.random() < 0.9,
                early=die.random() < 0.5,
            ),
            prompt=die.random() < 0.6,
        )
        self.errors = 0.0 if tame else die.choice((0.02, 0.2))
        self.deadly = die.choice((0.002, 0.002, 0.01, 0.018))
        self.patient = die.choice((0.005, 0.02))
        """How soon a quarantine ends."""
        self.hasty = die.choice((0.3, 0.6, 0.9))
        """How soon I/O completes."""
        self.rare: tuple[Callable[[], None], ...] = (
            self.grow,
            self.mark,
            lambda: self.world.tick(S),
            self.set_room,
            self.set_room,
            self.set_rate,
            lambda: self.world.pass_time(die.choice((1, 10**6, 10**8, S))),
            *(() if tame else (self.slow, self.starve, self.damage, self.fail_data, self.forsake)),
        )

    def sector(self) -> int:
        """Mostly within a few units, at or near their borders."""
        die, shape = self.die, self.world.shape
        per_unit = shape.unit // SECTOR
        if die.random() < 0.2:
            return die.randrange(shape.size // SECTOR)
        leaf = 64 * die.randrange(1 + shape.units // 64)
        unit = min(die.choice((0, 0, 1, 2, 63, 64, 65535, 65536, leaf, leaf, shape.units)), shape.units - 1)
        return unit * per_unit + die.choice((0, 0, 0, 1, per_unit - 1))

    def sectors(self) -> int:
        per_unit = self.world.shape.unit // SECTOR
        return self.die.choice((1, 1, 2, per_unit, per_unit, per_unit + 1, 2 * per_unit, 5 * per_unit, 1 << 20))

    def flags(self) -> int:
        return self.die.choice(FLAGS)

    def step(self) -> None:
        """One step."""
        die, world = self.die, self.world
        chance = die.random()
        impatient = [store for store in world.stores if store.waiting and store.wait_ns <= LONG_NS]
        if impatient and die.random() < 0.1:
            world.tick(die.choice(impatient).wait_ns)
        if world.settling and die.random() < 0.2:
            world.portion(die.randrange(len(world.disks)))
        if not world.swept or world.late or world.again or any(store.quarantined for store in world.stores):
            self.aftermath()
        if chance < self.deadly and len(world.portions) < MOST_PORTIONS:
            cut = None if self.interrupted() else self.cut()
            death(world, [die.randrange(60) for _ in range(die.randrange(12))], cut)
        elif chance < 0.02:
            die.choice(self.rare)()
        elif chance < 0.03:
            world.evict(die.randrange(16))
        elif chance < 0.12:
            self.instant()
        elif world.ios and die.random() < self.hasty:
            self.some_io()
        elif chance < 0.6:
            world.change(die.randrange(8), die.choice(CHANGES), self.sector(), self.sectors(), self.flags())
        elif chance < 0.75 and world.held:
            world.read_image(die.randrange(16), self.sector(), self.sectors(), self.flags())
        elif chance < 0.85 and world.held:
            world.write_image(die.randrange(16), die.choice(IMAGE_CHANGES), self.sector(), self.sectors(), self.flags())
        elif chance < 0.95:
            world.read(die.randrange(8), self.sector(), self.sectors(), self.flags())
        elif chance < 0.97:
            world.flush(die.randrange(8))
        if not world.prompt and die.random() < 0.5:
            queues = world.device_queues + [held.queue for held in world.held if held.queue is not None]
            woken = [queue for queue in queues if world.sim.woken(queue)]
            world.run(die.choice(woken) if woken and die.random() < 0.8 else None)

    def some_io(self) -> None:
        die, world = self.die, self.world
        number = die.randrange(len(world.ios)) if die.random() < 0.8 else 0
        kind = die.random()
        if kind < 0.15:
            world.apply(number)
        elif kind < 0.25:
            io = world.pick(number)
            assert io
            world.complete(number, short=self.short(io))
        elif kind < 0.25 + 0.75 * self.errors:
            world.complete(number, error=die.choice(ERRORS))
        else:
            world.complete(number)

    def short(self, io: SimIo) -> int:
        most = max(1, io.length // SECTOR)
        return self.die.choice((1, 1, most // 2, most - 1, most)) * SECTOR - self.die.choice((0, 0, 0, 1, 511))

    def instant(self) -> None:
        """Moves towards a switch, or does it."""
        die, world = self.die, self.world
        number = die.randrange(len(world.disks))
        disk = world.disks[number]
        closed = [n for n, other in enumerate(world.disks) if other.gate_closed]
        if not disk.gate_closed:
            world.close_gate(number)
        elif die.random() < 0.25:
            world.open_gate(number)
        elif not world.still(disk):
            return
        elif not world.held or (len(world.held) < self.many and die.random() < 0.6):
            world.take(closed, die.randrange(4), self.exempt())
        elif die.random() < 0.7:
            world.drop(die.randrange(16))
        else:
            world.replay(number, die.choice((1, 5, 1000)) * disk.shape.tracking_block)

    def interrupted(self) -> bool:
        """A step that the process, about to die, does not finish; whether there was one."""
        die, world = self.die, self.world
        steps: list[Callable[[], object]] = []
        steps += [partial(world.portion, held.disk.number) for held in world.settling[:1]]
        steps += [partial(world.complete, n) for n, io in enumerate(world.ios) if io in world.applied]
        if not world.swept:
            steps.append(world.sweep_portion)
        elif any(store.quarantined for store in world.stores):
            steps.append(world.end_quarantine)
        if not steps or die.random() < 0.5:
            return False
        with suppress(NotImplementedError):
            dies(die.choice(steps), outliving(world), die.choice((0, 1, 2, 3, 5, 8, 13, 21, 34)))
            world.torn = True
        return world.torn

    def cut(self) -> Cut | None:
        die = self.die
        if die.random() < 0.4:
            return None
        return Cut(
            die.randrange(16),
            die.choice((0, 0, 1, 2)),
            die.choice((1, 1, 2, 100)),
            die.random() < 0.3,
            die.random() < 0.5,
        )

    def aftermath(self) -> None:
        """What follows a death, a part of it now and then."""
        die, world = self.die, self.world
        chance = die.random()
        if chance < 0.05:
            world.land(die.randrange(16), half=die.random() < 0.3)
        elif chance < 0.1:
            world.sweep_portion()
        elif chance < 0.1 + self.patient:
            world.end_quarantine()
        elif chance < 0.2 and world.again:
            number = die.randrange(len(world.again))
            if not world.drop_again(number):
                world.close_gate(world.again[number].disk.number)

    def exempt(self) -> list[tuple[int, int]]:
        die = self.die
        if die.random() < 0.6:
            return []
        starts = [die.choice((0, 1, 60, 64, 100, 65500)) for _ in range(die.randrange(1, 3))]
        return [(start + die.randrange(4), die.choice((1, 2, 5, 64, 130))) for start in starts]

    def grow(self) -> None:
        self.world.grow(self.die.randrange(4), self.die.choice((1, 3, 100)))

    def set_room(self) -> None:
        wait_ms = self.die.choice((0, 0, 1, 500, 5000, 40_000, 10**8))
        self.world.set_room(self.die.randrange(4), wait_ms, self.die.choice((0, 1, 3, 50)))

    def set_rate(self) -> None:
        self.world.set_rate(self.die.randrange(4), self.die.choice((0, 0, 1, 4096, 1 << 20, 1 << 40)))

    def forsake(self) -> None:
        self.world.forsake(self.die.randrange(16))

    def mark(self) -> None:
        self.world.mark(self.die.randrange(4), self.sector(), self.sectors())

    def slow(self) -> None:
        self.world.tick(self.die.choice((6, 29, 31)) * S)

    def starve(self) -> None:
        if self.world.scarcity or not self.world.arena.total:
            self.world.feed()
        else:
            self.world.starve(self.die.choice((0, 1, 2)))

    def damage(self) -> None:
        record_byte = self.die.choice((None, None, self.die.randrange(16)))
        self.world.damage(
            self.die.randrange(4), self.die.randrange(1 << 16), record_byte, byte=self.die.randrange(1 << 16)
        )

    def fail_data(self) -> None:
        self.world.fail_data()


def play(seed: int, steps: int) -> None:
    """A whole life; AssertionError tells what is wrong."""
    dice = Dice(seed)
    for _ in range(steps // 10 if dice.world.shape.units > 65536 else steps):
        dice.step()
    end(dice.world, silent=dice.die.random() < 0.5)
