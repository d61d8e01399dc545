# SPDX-License-Identifier: MIT
"""How a storage is told to behave: by hand, by chance, and in a small world in which it fills and grows."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.snapshot.overflow import Action, OnOverflow, parse
from blksnap_ublk.snapshot.storage.behaviour import (
    LEVELS,
    MIB,
    PORTION_LEAST,
    PORTION_MOST,
    Behaviour,
    Facts,
    decide,
    levels_reached,
)
from blksnap_ublk.snapshot.storage.extending import SMALLEST

UNIT = 4096
GIB = 1 << 30
BREAK, PAUSE, EVICT = parse("break"), parse("pause:30"), parse("evict-oldest")

POLICIES = st.sampled_from([BREAK, PAUSE, EVICT])


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    capacity = draw(st.integers(1, 1 << 28)) * UNIT
    return Facts(
        unit=UNIT,
        capacity=capacity,
        used=draw(st.integers(0, capacity // UNIT)) * UNIT,
        room=draw(st.integers(0, 1 << 44)),
        on_overflow=draw(POLICIES),
        rest=draw(st.booleans()),
        rate=draw(st.floats(0, 1e11)),
        waiting=draw(st.integers(0, 3)),
        failed=draw(st.booleans()),
        written=draw(st.booleans()),
        evictable=draw(st.booleans()),
        evicting=draw(st.booleans()),
        told=draw(st.sampled_from([0, *LEVELS])),
    )


def of(policy: OnOverflow = BREAK, *, capacity: int = GIB, used: int = 0, room: int = 0) -> Facts:
    return Facts(unit=UNIT, capacity=capacity, used=used, room=room, on_overflow=policy)


@given(facts())
def test_what_always_holds(facts: Facts) -> None:
    decided = decide(facts)
    assert decided.grow % UNIT == 0
    assert 0 <= decided.grow <= min(facts.room, PORTION_MOST)
    assert decided.wait_ms >= 0
    assert decided.low >= 0
    if decided.evict:
        assert facts.on_overflow.action is Action.EVICT_OLDEST
        assert facts.evictable
        assert facts.failed or facts.room < _portion_least(facts)
    if facts.on_overflow.action is Action.PAUSE:
        assert decided.wait_ms == 30_000
    if facts.waiting and facts.room >= _portion_least(facts):
        assert decided.grow


def _portion_least(facts: Facts) -> int:
    return UNIT if facts.rest else max(UNIT, min(SMALLEST, facts.capacity // 64))


def test_what_is_freed_now_and_then_is_no_portion_but_the_rest_of_a_limit_is() -> None:
    full = of(capacity=256 * MIB, used=256 * MIB, room=UNIT)
    assert decide(full).grow == 0
    assert decide(replace(full, room=SMALLEST - 1)).grow == 0
    assert decide(replace(full, room=SMALLEST)).grow == SMALLEST
    assert decide(replace(full, rest=True)).grow == UNIT
    tiny = of(capacity=MIB, used=MIB, room=UNIT)
    assert decide(tiny).grow == 0
    assert decide(replace(tiny, room=MIB // 64)).grow == MIB // 64


def test_a_portion_is_sized_by_the_rate() -> None:
    slow = of(capacity=256 * MIB, used=200 * MIB, room=1 << 40)
    assert decide(slow).grow == PORTION_LEAST
    assert decide(replace(slow, rate=100 * MIB)).grow == 400 * MIB
    assert decide(replace(slow, rate=10 * GIB)).grow == PORTION_MOST
    assert decide(replace(slow, room=10 * MIB + 1)).grow == 10 * MIB
    assert decide(replace(slow, waiting=1)).grow == 256 * MIB
    large = of(capacity=64 * GIB, used=64 * GIB - MIB, room=1 << 40)
    assert decide(large).grow == GIB


def test_room_is_kept_free_ahead_of_the_rate() -> None:
    half = of(used=512 * MIB, room=1 << 40)
    assert decide(half).grow == 0
    assert decide(replace(half, rate=160 * MIB)).grow == 0
    assert decide(replace(half, rate=180 * MIB)).grow > 0
    assert decide(replace(half, used=GIB - 60 * MIB)).grow > 0
    assert decide(of(capacity=4 * MIB, used=2 * MIB, room=GIB)).grow == 0
    assert decide(of(capacity=4 * MIB, used=4 * MIB, room=GIB)).grow > 0


def test_writes_to_images_find_room_before_their_reserve() -> None:
    facts = of(capacity=4 * GIB, used=3 * GIB + 512 * MIB, room=1 << 40)
    assert decide(facts).grow == 0
    assert decide(replace(facts, written=True)).grow > 0


def test_how_long_writers_wait() -> None:
    def wait_ms(facts: Facts) -> int:
        return decide(facts).wait_ms

    assert wait_ms(of(room=GIB)) == 10_000
    assert wait_ms(of()) == 0
    assert wait_ms(replace(of(room=GIB), failed=True)) == 0
    assert wait_ms(of(parse("pause:7"))) == 7000
    assert wait_ms(of(EVICT)) == 0
    assert wait_ms(of(EVICT, room=GIB)) == 30_000
    assert wait_ms(replace(of(EVICT), evictable=True)) == 30_000
    assert wait_ms(replace(of(EVICT), evicting=True)) == 30_000


def test_who_is_evicted_and_when() -> None:
    full = replace(of(EVICT, used=GIB), evictable=True)
    assert decide(full).evict
    assert decide(replace(full, used=GIB * 9 // 10, waiting=1)).evict
    assert not decide(replace(full, used=GIB * 9 // 10)).evict
    assert not decide(replace(full, room=GIB)).evict
    assert decide(replace(full, room=GIB, failed=True)).evict
    assert not decide(replace(full, on_overflow=BREAK)).evict


def test_the_bell_rings_at_the_next_level_where_nothing_grows() -> None:
    assert decide(of()).low == GIB // 5
    assert decide(replace(of(), told=80)).low == GIB // 10
    assert decide(replace(of(), told=95)).low == 0
    assert decide(replace(of(EVICT), told=95, evictable=True)).low == GIB // 20
    assert decide(of(room=GIB)).low == 64 * MIB


def test_each_level_is_told_once_until_it_falls_well_below() -> None:
    assert levels_reached(79, 100, 0) == ([], 0)
    assert levels_reached(80, 100, 0) == ([80], 80)
    assert levels_reached(80, 100, 80) == ([], 80)
    assert levels_reached(100, 100, 0) == ([80, 90, 95], 95)
    assert levels_reached(91, 100, 95) == ([], 95)
    assert levels_reached(89, 100, 95) == ([], 90)
    assert levels_reached(74, 100, 95) == ([], 0)
    assert levels_reached(0, 0, 0) == ([], 0)


@given(st.lists(st.integers(0, 100), max_size=30))
def test_levels_by_chance(percents: list[int]) -> None:
    told, armed = 0, set(LEVELS)
    for percent in percents:
        found, told = levels_reached(percent, 100, told)
        assert found == [level for level in LEVELS if level in armed and level <= percent]
        armed -= set(found)
        armed |= {level for level in LEVELS if percent <= level - 5}


@given(
    policy=POLICIES,
    start=st.integers(1, 256 * MIB // UNIT),
    limit=st.integers(0, 64 * GIB // UNIT),
    rates=st.lists(st.integers(0, 2 * GIB), min_size=1, max_size=40),
    delay=st.integers(0, 3),
)
def test_no_writer_is_turned_away_before_the_limit(
    policy: OnOverflow, start: int, limit: int, rates: list[int], delay: int
) -> None:
    """Steps of a quarter of a second; what does not fit waits, and growth takes some steps."""
    capacity, limit = start * UNIT, max(limit, start) * UNIT
    used = left = 0
    growth: tuple[int, int] | None = None
    steps_without_room = 0
    for rate in [*rates, *[0] * 200]:
        left += rate // 4
        written = min(left, capacity - used) // UNIT * UNIT
        used, left = used + written, left - written
        waiting = left >= UNIT
        decided = decide(
            replace(of(policy, capacity=capacity, used=used, room=limit - capacity), waiting=int(waiting), rate=rate)
        )
        if waiting and capacity < limit:
            assert decided.wait_ms >= 10_000
            steps_without_room += 1
            assert steps_without_room <= 2 * (delay + 2)
        else:
            steps_without_room = 0
        if growth is None and decided.grow:
            growth = (delay, decided.grow)
        elif growth is not None:
            steps, size = growth
            growth = (steps - 1, size) if steps else None
            if growth is None:
                capacity += size
                steps_without_room = 0
                assert capacity <= limit
    assert left < UNIT or capacity + UNIT > limit


def test_decisions_are_values() -> None:
    assert decide(of()) == Behaviour(grow=0, wait_ms=0, low=GIB // 5, evict=False)
