# SPDX-License-Identifier: MIT
"""How a difference storage is to behave as it fills: when it grows, how long writers wait for room, who is evicted.

Nothing here looks at anything: what is known comes in, what is to be done comes out. Sizes in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from blksnap_ublk.snapshot.overflow import Action, OnOverflow
from blksnap_ublk.snapshot.storage.extending import SMALLEST

MIB = 1 << 20
LEVELS = (80, 90, 95)
"""Per cent of what a storage can have that are told when they are reached."""

PORTION_LEAST = 64 * MIB
PORTION_MOST = 4 << 30
_PORTION_SECONDS = 4.0  # of writing at the present rate fit into a portion
_AHEAD_SECONDS = 3.0  # of writing at the present rate are kept free
_AHEAD_LEAST = 64 * MIB
_SHARE = 64  # a portion is at least this part of what there is: a storage has 4096 areas at most
_IMAGE_RESERVE = 8  # this part of a storage is kept for copies; writes to images stop there
_EVICT_BELOW = 20  # an older snapshot is evicted when less than this part is free
_GROWTH_WAIT_MS = 10_000
_EVICTION_WAIT_MS = 30_000
_LEVEL_BACK = 5  # per cent below a level, until it can be told again


@dataclass(frozen=True)
class Facts:
    """What is known of a storage. `room`: what growth may still add; 0 where nothing grows, or the limit is reached.
    `rest`: it is what is left up to a limit, so a small portion is the last one; without a limit it is what happens to
    be free, and small portions could go on for ever.

    `rate`: bytes per second that went into it of late. `waiting`: requests that wait for room. `failed`: the last
    attempt to make it larger failed, or does not end. `written`: images in it are written to. `evictable`: it holds an
    older snapshot that could go; `evicting`: one is going, or its places are about to come free. `told`: the highest of
    `LEVELS` that was told, or 0.
    """

    unit: int
    capacity: int
    used: int
    room: int
    on_overflow: OnOverflow
    rest: bool = False
    rate: float = 0.0
    waiting: int = 0
    failed: bool = False
    written: bool = False
    evictable: bool = False
    evicting: bool = False
    told: int = 0


@dataclass(frozen=True)
class Behaviour:
    """What is to be done. `grow`: make it larger by so much now, 0: not. `evict`: an older snapshot is to go now.

    `wait_ms`: how long writers that find no place wait; `low`: the io process tells when less is free.
    """

    grow: int
    wait_ms: int
    low: int
    evict: bool


def decide(facts: Facts) -> Behaviour:
    """What is to be done with a storage, of which at least one snapshot is not broken."""
    free = facts.capacity - facts.used
    ahead = _ahead(facts)
    may_grow = facts.room >= (facts.unit if facts.rest else max(facts.unit, min(SMALLEST, facts.capacity // _SHARE)))
    grows = may_grow and not facts.failed
    action = facts.on_overflow.action
    short = facts.waiting > 0 or free < facts.capacity / _EVICT_BELOW
    return Behaviour(
        grow=_portion(facts, free, ahead) if may_grow and (facts.waiting or free < ahead) else 0,
        wait_ms=_wait_ms(facts, grows),
        low=_power_of_two(ahead) if grows else _free_at_next_level(facts),
        evict=action is Action.EVICT_OLDEST and not grows and short and facts.evictable,
    )


def levels_reached(used: int, reach: int, told: int) -> tuple[list[int], int]:
    """The `LEVELS` to tell now, and the highest that counts as told: each once, until it falls well below.

    `reach`: what the storage can have at most.
    """
    percent = 100 * used / max(reach, 1)
    found = [level for level in LEVELS if told < level <= percent]
    highest = max([told, *found])
    return found, max((level for level in LEVELS if level <= highest and percent > level - _LEVEL_BACK), default=0)


def _ahead(facts: Facts) -> int:
    """What is to be free."""
    ahead = max(int(facts.rate * _AHEAD_SECONDS), min(_AHEAD_LEAST, facts.capacity // 4))
    return ahead + (facts.capacity // _IMAGE_RESERVE if facts.written else 0)


def _portion(facts: Facts, free: int, ahead: int) -> int:
    # Who waits for room does not show in the rate.
    doubling = facts.capacity if facts.waiting else 0
    wanted = max(int(facts.rate * _PORTION_SECONDS), PORTION_LEAST, facts.capacity // _SHARE, doubling, ahead - free)
    return min(wanted, PORTION_MOST, facts.room) // facts.unit * facts.unit


def _wait_ms(facts: Facts, grows: bool) -> int:
    if facts.on_overflow.action is Action.PAUSE:
        return int((facts.on_overflow.seconds or 0) * 1000)
    if facts.on_overflow.action is Action.EVICT_OLDEST:
        return _EVICTION_WAIT_MS if grows or facts.evictable or facts.evicting else 0
    return _GROWTH_WAIT_MS if grows else 0


def _free_at_next_level(facts: Facts) -> int:
    """Nothing is added any more: what is free when the next level is reached, or somebody is to be evicted."""
    level = next((level for level in LEVELS if level > facts.told), 100)
    free = facts.capacity * (100 - level) // 100
    if facts.on_overflow.action is Action.EVICT_OLDEST and facts.evictable:
        free = max(free, facts.capacity // _EVICT_BELOW)
    return free


def _power_of_two(number: int) -> int:
    """At least `number`; so that it does not change with every reading of the rate."""
    return 1 << max(number - 1, 0).bit_length()
