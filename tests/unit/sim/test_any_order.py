# SPDX-License-Identifier: MIT
"""Requests, completions, faults, switches in any order that hypothesis thinks of: the promises hold after each step."""

from __future__ import annotations

import errno
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from blksnap_ublk.engine.request import Flags, Op
from blksnap_ublk.engine.sim import NEED_COPY
from tests.unit.sim.budget import EXAMPLES, SEEDED, STEPS
from tests.unit.sim.death import die
from tests.unit.sim.ending import end
from tests.unit.sim.judge import S
from tests.unit.sim.shape import GEOMETRIES, SECTOR, STORAGES, Shape
from tests.unit.sim.torn import Cut
from tests.unit.sim.world import World

few = st.integers(0, 7)
flags = st.sampled_from([0, Flags.FUA, NEED_COPY, Flags.FUA | NEED_COPY])
sectors = st.sampled_from([1, 2, 7, 8, 9, 16, 24, 128, 1 << 20])
starts = st.integers(0, 40) | st.sampled_from([63 * 8, 64 * 8 - 1, 64 * 8]) | st.integers(0, 1 << 12)
errors = st.sampled_from([errno.EIO, errno.ENOSPC, errno.EAGAIN, errno.EINTR])
changes = st.sampled_from([Op.WRITE, Op.WRITE_ZEROES, Op.DISCARD])
image_changes = st.sampled_from([Op.WRITE, Op.WRITE, Op.WRITE_ZEROES])
cuts = st.none() | st.builds(
    Cut, few, st.sampled_from([0, 0, 1, 2]), st.sampled_from([1, 1, 2, 100]), half=st.booleans(), kept=st.booleans()
)
shapes = st.builds(
    lambda geometry, **rest: Shape(**geometry, **rest),
    st.sampled_from(GEOMETRIES[:6]),
    disks=st.integers(1, 2),
    threads=st.integers(1, 2),
    queues=st.integers(1, 3),
    depth=st.sampled_from([1, 2, 8]),
    zero_copy=st.booleans(),
    early=st.booleans(),
    storages=st.sampled_from(STORAGES),
    map_memory=st.sampled_from([True, True, True, False]),
)


class AnyOrder(RuleBasedStateMachine):
    """A world, and each of its steps as a rule."""

    world: World | None = None

    @initialize(shape=shapes, prompt=st.booleans(), held=st.integers(0, 3), silent=st.booleans())
    def begin(self, shape: Shape, prompt: bool, held: int, silent: bool) -> None:
        self.w = self.world = World(shape, prompt=prompt)
        self.silent = silent
        for _ in range(held):
            for disk in range(shape.disks):
                self.w.close_gate(disk)
            assert self.w.take([0, 1], 0)
            for disk in range(shape.disks):
                self.w.open_gate(disk)

    @rule(queue=few, op=changes, start=starts, sectors=sectors, flags=flags)
    def change(self, queue: int, op: Op, start: int, sectors: int, flags: int) -> None:
        self.w.change(queue, op, start, sectors, flags)

    @rule(queue=few, start=starts, sectors=sectors)
    def write(self, queue: int, start: int, sectors: int) -> None:
        self.w.change(queue, Op.WRITE, start, sectors)

    @rule(queue=few, start=starts, sectors=sectors, flags=flags)
    def read(self, queue: int, start: int, sectors: int, flags: int) -> None:
        self.w.read(queue, start, sectors, flags)

    @rule(queue=few)
    def flush(self, queue: int) -> None:
        self.w.flush(queue)

    @precondition(lambda self: self.w.held)
    @rule(image=few, start=starts, sectors=sectors, flags=flags)
    def read_image(self, image: int, start: int, sectors: int, flags: int) -> None:
        self.w.read_image(image, start, sectors, flags)

    @precondition(lambda self: self.w.held)
    @rule(image=few, op=image_changes, start=starts, sectors=sectors, flags=flags)
    def write_image(self, image: int, op: Op, start: int, sectors: int, flags: int) -> None:
        self.w.write_image(image, op, start, sectors, flags)

    @precondition(lambda self: self.w.settling)
    @rule(disk=few)
    def portion(self, disk: int) -> None:
        self.w.portion(disk)

    @precondition(lambda self: self.w.ios)
    @rule(io=st.integers(0, 30))
    def apply(self, io: int) -> None:
        self.w.apply(io)

    @precondition(lambda self: self.w.ios)
    @rule(io=st.integers(0, 30), more=st.integers(0, 3))
    def complete(self, io: int, more: int) -> None:
        for _ in range(1 + more):
            self.w.complete(io)

    @precondition(lambda self: self.w.ios)
    @rule(io=st.integers(0, 30), error=errors)
    def fail(self, io: int, error: int) -> None:
        self.w.complete(io, error=error)

    @precondition(lambda self: self.w.ios)
    @rule(io=st.integers(0, 30), short=st.integers(0, 20), odd=st.sampled_from([0, 0, 1, 511]))
    def shorten(self, io: int, short: int, odd: int) -> None:
        self.w.complete(io, short=short * SECTOR + odd)

    @precondition(lambda self: not self.w.prompt)
    @rule(queue=st.none() | few)
    def run_queue(self, queue: int | None) -> None:
        self.w.run(queue)

    @rule(disk=few)
    def close_gate(self, disk: int) -> None:
        self.w.close_gate(disk)

    @rule(disk=few)
    def open_gate(self, disk: int) -> None:
        self.w.open_gate(disk)

    @precondition(lambda self: any(disk.gate_closed for disk in self.w.disks))
    @rule(store=few, exempt=st.lists(st.tuples(st.integers(0, 70), st.sampled_from([1, 3, 64, 100])), max_size=2))
    def take(self, store: int, exempt: list[tuple[int, int]]) -> None:
        self.w.take([disk.number for disk in self.w.disks if disk.gate_closed], store, exempt)

    @precondition(lambda self: self.w.held and any(disk.gate_closed for disk in self.w.disks))
    @rule(image=few)
    def drop(self, image: int) -> None:
        self.w.drop(image)

    @precondition(lambda self: any(disk.gate_closed for disk in self.w.disks))
    @rule(disk=few, blocks=st.sampled_from([1, 5, 1000]))
    def replay(self, disk: int, blocks: int) -> None:
        self.w.replay(disk, blocks * self.w.shape.tracking_block)

    @rule(disk=few, start=starts, sectors=sectors)
    def mark(self, disk: int, start: int, sectors: int) -> None:
        self.w.mark(disk, start, sectors)

    @rule(seconds=st.sampled_from([1, 6, 29, 31]))
    def tick(self, seconds: int) -> None:
        self.w.tick(seconds * S)

    @rule(store=few, units=st.sampled_from([1, 3, 100]))
    def grow(self, store: int, units: int) -> None:
        self.w.grow(store, units)

    @rule(store=few, wait_ms=st.sampled_from([0, 500, 5000, 40_000]), low=st.sampled_from([0, 2, 50]))
    def set_room(self, store: int, wait_ms: int, low: int) -> None:
        self.w.set_room(store, wait_ms, low)

    @rule(store=few, rate=st.sampled_from([0, 1, 4096, 1 << 20]))
    def set_rate(self, store: int, rate: int) -> None:
        self.w.set_rate(store, rate)

    @rule(ns=st.sampled_from([1, 10**6, 10**9]))
    def pass_time(self, ns: int) -> None:
        self.w.pass_time(ns)

    @precondition(lambda self: self.w.held)
    @rule(image=few)
    def evict(self, image: int) -> None:
        self.w.evict(image)

    @precondition(lambda self: self.w.held)
    @rule(image=few)
    def forsake(self, image: int) -> None:
        self.w.forsake(image)

    @rule(pages=st.integers(0, 2))
    def starve(self, pages: int) -> None:
        self.w.starve(pages)

    @rule()
    def feed(self) -> None:
        self.w.feed()

    @rule(store=few, place=st.integers(0, 100), byte=st.integers(0, 8191), record_byte=st.none() | st.integers(0, 15))
    def damage(self, store: int, place: int, byte: int, record_byte: int | None) -> None:
        self.w.damage(store, place, record_byte, byte=byte)

    @rule()
    def fail_data(self) -> None:
        self.w.fail_data()

    @precondition(lambda self: len(self.w.portions) < 8)
    @rule(landing=st.lists(st.integers(0, 60), max_size=8), cut=cuts)
    def die(self, landing: list[int], cut: Cut | None) -> None:
        die(self.w, landing, cut)

    @precondition(lambda self: self.w.late)
    @rule(late=few, half=st.booleans())
    def land(self, late: int, half: bool) -> None:
        self.w.land(late, half=half)

    @precondition(lambda self: not self.w.swept)
    @rule()
    def sweep_portion(self) -> None:
        self.w.sweep_portion()

    @precondition(lambda self: self.w.swept and any(store.quarantined for store in self.w.stores))
    @rule()
    def end_quarantine(self) -> None:
        self.w.end_quarantine()

    @precondition(lambda self: self.w.swept and self.w.again)
    @rule(image=few)
    def drop_again(self, image: int) -> None:
        self.w.drop_again(image)

    def teardown(self) -> None:
        if self.world and self.world.sound:
            end(self.world, silent=self.silent)


TestAnyOrder: Any = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    print_blob=True,
    phases=[Phase.generate] if SEEDED else list(Phase),
    suppress_health_check=list(HealthCheck),
)
