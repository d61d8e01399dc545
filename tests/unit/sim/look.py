# SPDX-License-Identifier: MIT
"""What a test asks a simulated world."""

from __future__ import annotations

from blksnap_ublk.engine import ImageStatus
from blksnap_ublk.engine.sim import SimIo
from tests.unit.sim.script import Kind, kind_of
from tests.unit.sim.world import World


def waiting(world: World) -> list[Kind]:
    """What is outstanding, oldest first."""
    return [kind_of(world, io) for io in world.ios.values()]


def find(world: World, kind: Kind) -> int:
    """Number of the oldest I/O of that kind, for `World.complete`."""
    return waiting(world).index(kind)


def io_of(world: World, kind: Kind) -> SimIo:
    """That I/O."""
    return list(world.ios.values())[find(world, kind)]


def statuses(world: World) -> list[tuple[ImageStatus, int]]:
    """Of all held images, in the order they were taken."""
    return [held.image.status for held in world.held]


ACTIVE = (ImageStatus.ACTIVE, 0)
