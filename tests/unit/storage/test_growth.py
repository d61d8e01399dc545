# SPDX-License-Identifier: MIT
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.errors import BlksnapError, Failed, UsageError
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.storage.growth import FIRST, MIB, Growable, plan_sizes

UNIT = 4096
GIB = 1 << 30


def _file(size: int, room: int = 10 * GIB, filesystem: int = 1) -> Growable:
    return Growable("/f", size, False, DeviceNumber(8, filesystem), room, max(room - GIB, 0))


def _directory(room: int = 10 * GIB, filesystem: int = 1) -> Growable:
    return Growable("/d", 0, True, DeviceNumber(8, filesystem), room, max(room - GIB, 0))


def _plan(growables: list[Growable], *, fixed: int = 0, limit: int | None = None, needed: int = GIB) -> list[int]:
    return plan_sizes(growables, fixed=fixed, limit=limit, needed=needed, unit=UNIT)


def test_files_stay_and_directories_begin_with_what_is_needed() -> None:
    for limit in (None, 8 * GIB):
        assert _plan([_file(64 * MIB)], limit=limit) == [64 * MIB]
        assert _plan([_directory()], needed=100 * MIB, limit=limit) == [100 * MIB]
        assert _plan([_directory()], needed=100 * MIB + 1, limit=limit) == [100 * MIB + UNIT]
        assert _plan([_directory()], limit=limit) == [FIRST]
        assert _plan([_file(64 * MIB), _directory()], fixed=36 * MIB, needed=150 * MIB, limit=limit) == [
            64 * MIB,
            50 * MIB,
        ]
        assert _plan([_directory(), _directory(filesystem=2)], needed=MIB, limit=limit) == [MIB, MIB]


def test_without_a_limit_the_reserve_stays_free() -> None:
    assert _plan([_directory(GIB + 5 * MIB)]) == [5 * MIB]
    assert _plan([_directory(GIB + 5 * MIB), _directory(filesystem=2)]) == [5 * MIB, FIRST]
    with pytest.raises(Failed, match=r"less than 1 MiB.*--limit"):
        _plan([_directory(GIB + MIB - UNIT)])
    with pytest.raises(Failed, match="less than 1 MiB"):
        _plan([_directory(GIB + 5 * MIB), _directory(GIB + 5 * MIB)])


def test_a_limit_is_not_passed_and_the_reserve_can_be_used() -> None:
    assert _plan([_directory()], limit=10 * MIB) == [10 * MIB]
    assert _plan([_directory(5 * MIB)], limit=GIB) == [5 * MIB]
    assert _plan([_file(GIB)], limit=64 * MIB) == [GIB]
    assert _plan([_directory(), _file(0), _file(MIB)], limit=11 * MIB) == [5 * MIB, 5 * MIB, MIB]
    assert _plan([_directory(), _file(0)], limit=3 * UNIT) == [UNIT, 2 * UNIT]
    assert _plan([_file(UNIT - 1)], limit=UNIT) == [UNIT]
    assert _plan([_directory()], fixed=GIB, limit=GIB + 3 * MIB, needed=3 * GIB) == [3 * MIB]
    with pytest.raises(UsageError, match="nothing is left"):
        _plan([_directory()], fixed=GIB, limit=GIB)
    with pytest.raises(Failed, match="full"):
        _plan([_directory(0), _directory(filesystem=2)], limit=GIB)


def test_room_that_is_given_away_is_not_given_again() -> None:
    assert _plan([_directory(10 * MIB), _directory(10 * MIB, filesystem=2)], limit=GIB) == [10 * MIB, 10 * MIB]
    with pytest.raises(Failed, match="full"):
        _plan([_directory(10 * MIB), _directory(10 * MIB)], limit=GIB)


def test_an_empty_file_needs_a_limit() -> None:
    with pytest.raises(UsageError, match=r"is empty; give --limit"):
        _plan([_file(0)])
    assert _plan([_file(0)], limit=MIB) == [MIB]
    assert _plan([_file(100)], limit=MIB) == [MIB]


GROWABLES = st.lists(
    st.builds(
        lambda directory, size, room, filesystem: (
            _directory(room, filesystem) if directory else _file(size, room, filesystem)
        ),
        st.booleans(),
        st.integers(0, 4 * GIB),
        st.integers(0, 4 * GIB),
        st.integers(1, 6),
    ),
    max_size=5,
    unique_by=lambda each: each.filesystem,
)


@given(GROWABLES, st.integers(0, 2 * GIB), st.none() | st.integers(1, 8 * GIB), st.integers(0, 8 * GIB))
def test_nothing_shrinks_and_no_room_is_spent_twice(
    growables: list[Growable], fixed: int, limit: int | None, needed: int
) -> None:
    try:
        sizes = _plan(growables, fixed=fixed, limit=limit, needed=needed)
    except BlksnapError:
        return
    assert len(sizes) == len(growables)
    before = fixed + sum(each.size for each in growables)
    for each, size in zip(growables, sizes, strict=True):
        assert size >= max(each.size, UNIT)
        assert size == each.size or size <= FIRST
        assert size - each.size <= (each.room_with_reserve if limit is None else each.room)
    if limit is not None:
        assert fixed + sum(sizes) <= max(before, limit)
