# SPDX-License-Identifier: MIT
"""Short stories for the sweep of faults: together they take every way through the core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blksnap_ublk.engine.request import Flags, Op
from tests.unit.sim.script import Trouble, flow
from tests.unit.sim.shape import Shape
from tests.unit.sim.world import World

HOUR_MS = 3_600_000

Story = Callable[[World, Trouble], None]


def take(world: World, *members: int, store: int = 0, trouble: Trouble) -> None:
    """Closes the gates, waits until all is still, switches, opens."""
    for disk in members:
        world.close_gate(disk)
    flow(world, trouble)
    assert world.take(list(members), store)
    for disk in members:
        world.open_gate(disk)


def drop(world: World, disk: int, trouble: Trouble) -> None:
    """The oldest image of the first chain of a disk goes."""
    world.close_gate(disk)
    flow(world, trouble)
    assert world.drop(next(n for n, held in enumerate(world.held) if held.disk.number == disk))
    world.hand_over()
    world.open_gate(disk)


def overwrite(world: World, trouble: Trouble) -> None:
    """Whole units and parts of them, the last one of the device too; again; and reads of everything."""
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 5, 12, Flags.FUA)
    flow(world, trouble)
    world.read_image(0, 1, 1000)
    flow(world, trouble)
    world.change(0, Op.WRITE, 0, 1000)
    world.read_image(0, 3, 1000)
    world.read(0, 7, 30)
    world.flush(0)
    flow(world, trouble)
    world.change(1, Op.WRITE, 3, 4)
    world.read_image(0, 0, 1000)
    flow(world, trouble)


def crowd(world: World, trouble: Trouble) -> None:
    """Writes that overlap one another, of several queues, none of which has ended when the next one comes."""
    take(world, 0, trouble=trouble)
    for start in (0, 4, 9, 0, 30, 4):
        world.change(start, Op.WRITE, start, 20)
        world.change(start + 1, Op.WRITE, start + 3, 9)
        world.read_image(0, start, 8)
    flow(world, trouble)
    world.read_image(0, 0, 1000)
    flow(world, trouble)


def generations(world: World, trouble: Trouble) -> None:
    """Three images of a chain and one of another, each with units of its own; the oldest goes."""
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 0, 16)
    flow(world, trouble)
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 8, 24)
    flow(world, trouble)
    take(world, 0, store=1, trouble=trouble)
    world.change(1, Op.WRITE, 0, 40)
    flow(world, trouble)
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 0, 1000)
    for image in range(4):
        world.read_image(image, 2, 1000)
    flow(world, trouble)
    drop(world, 0, trouble)
    for image in range(3):
        world.read_image(image, 0, 1000)
    flow(world, trouble)


def trims(world: World, trouble: Trouble) -> None:
    """Discards and zeroes, over what is preserved and what is not; what was swallowed is sent at last."""
    world.change(0, Op.DISCARD, 60, 1)
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 8, 24)
    flow(world, trouble)
    world.change(0, Op.DISCARD, 0, 48)
    world.change(1, Op.WRITE_ZEROES, 44, 9, Flags.NOUNMAP)
    flow(world, trouble)
    world.change(1, Op.DISCARD, 1, 1000)
    flow(world, trouble)
    world.change(0, Op.WRITE, 2, 3)
    world.read_image(0, 0, 1000)
    flow(world, trouble)
    drop(world, 0, trouble)
    world.close_gate(0)
    flow(world, trouble)
    while world.replay(0, 1):
        pass
    world.open_gate(0)
    world.read(0, 0, 1000)
    flow(world, trouble)


def members(world: World, trouble: Trouble) -> None:
    """Two disks that share a storage; changes wait at the gate while they are switched."""
    for disk in range(2):
        world.close_gate(disk)
    for queue in range(4):
        world.change(queue, Op.WRITE, 4 * queue, 10)
    assert world.take([0, 1], 0)
    for disk in range(2):
        world.open_gate(disk)
    flow(world, trouble)
    take(world, 0, 1, trouble=trouble)
    for queue in range(4):
        world.change(queue, Op.WRITE, 6 * queue, 10)
    for image in range(4):
        world.read_image(image, 0, 1000)
    flow(world, trouble)


def overflow(world: World, trouble: Trouble) -> None:
    """More is overwritten than the storage has room for."""
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 0, 8)
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 0, 16)
    flow(world, trouble)
    for start in (8, 16, 24, 32, 48):
        world.change(start, Op.WRITE, start, 9)
    world.read_image(0, 0, 1000)
    flow(world, trouble)


def scattered(world: World, trouble: Trouble) -> None:
    """More copies for one write than a queue has, and another write that waits for one."""
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 0, 1000)
    world.change(2, Op.WRITE, 8, 8)
    flow(world, trouble)
    world.read_image(0, 0, 1000)
    flow(world, trouble)


def scribbles(world: World, trouble: Trouble) -> None:
    """Two images of one content are written to: units and parts, over what is preserved, written, zero or none."""
    take(world, 0, trouble=trouble)
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 0, 16)
    flow(world, trouble)
    world.write_image(0, Op.WRITE, 3, 30)
    world.read_image(0, 0, 1000)
    world.write_image(1, Op.WRITE, 0, 8)
    world.change(1, Op.WRITE, 20, 9)
    flow(world, trouble)
    world.write_image(0, Op.WRITE_ZEROES, 4, 20)
    world.write_image(0, Op.WRITE, 10, 5)
    world.write_image(1, Op.WRITE, 41, 1000)
    for image in range(2):
        world.read_image(image, 0, 1000)
    flow(world, trouble)
    drop(world, 0, trouble)
    world.read_image(0, 0, 1000)
    flow(world, trouble)


def full(world: World, trouble: Trouble) -> None:
    """Writers wait for room. Some is added, some comes from the oldest image, which goes without the gate."""
    world.set_room(0, HOUR_MS)
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 0, 24)
    flow(world, trouble)
    take(world, 0, trouble=trouble)
    for queue in range(3):
        world.change(queue, Op.WRITE, 16 * queue, 20)
    flow(world, trouble)
    world.grow(0, 1)
    world.read_image(1, 0, 1000)
    flow(world, trouble)
    if world.evict(0):
        world.hand_over()
    flow(world, trouble)
    world.grow(0, 20)
    flow(world, trouble)
    world.read_image(0, 0, 1000)
    flow(world, trouble)


def exempted(world: World, trouble: Trouble) -> None:
    """Ranges that two images are exempt from, and a third one is not."""
    take(world, 0, trouble=trouble)
    world.change(0, Op.WRITE, 0, 40)
    flow(world, trouble)
    for exempt in ([(1, 3)], [(1, 3), (4, 1)], []):
        world.close_gate(0)
        flow(world, trouble)
        assert world.take([0], 0, exempt)
        world.open_gate(0)
        world.change(0, Op.WRITE, 4, 60)
        world.read_image(0, 0, 1000)
        flow(world, trouble)
    drop(world, 0, trouble)
    for image in range(3):
        world.read_image(image, 0, 1000)
    flow(world, trouble)


@dataclass(frozen=True)
class Scenario:
    """A story and the world it happens in."""

    story: Story
    shape: Shape
    overflows: bool = False

    @property
    def name(self) -> str:
        return f"{self.story.__name__}-{'zero copy' if self.shape.zero_copy else 'copy'}-{self.shape.unit}"


def _scenarios() -> list[Scenario]:
    found = []
    for zero_copy in (True, False):
        plain = Shape(zero_copy=zero_copy)
        two = Shape(zero_copy=zero_copy, storages=((100,), (3, 90)))
        found += [
            Scenario(overwrite, plain),
            Scenario(scattered, Shape(zero_copy=zero_copy, depth=2, queues=2, units=23, storages=((1,) * 24,))),
            Scenario(overwrite, Shape(zero_copy=zero_copy, unit=512, units=150, odd_sectors=0)),
            Scenario(crowd, Shape(zero_copy=zero_copy, threads=1, queues=3, depth=8, storages=((2, 1, 2, 60),))),
            Scenario(generations, two),
            Scenario(scribbles, plain),
            Scenario(trims, Shape(zero_copy=zero_copy, tracking_block=8192)),
            Scenario(members, Shape(zero_copy=zero_copy, disks=2, depth=8)),
            Scenario(full, Shape(zero_copy=zero_copy, depth=8, storages=((3, 2),))),
            Scenario(exempted, plain),
            Scenario(overflow, Shape(zero_copy=zero_copy, depth=8, storages=((3, 1, 1),)), overflows=True),
        ]
    return found


SCENARIOS = _scenarios()
