# SPDX-License-Identifier: MIT
"""Where a file lies beneath a filtered device: made-up extents."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.errors import Unsupported
from blksnap_ublk.host.extents import Extent, ExtentFlags
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.storage.beneath import (
    MAX_EXTENTS,
    Piece,
    Seat,
    cut,
    joined,
    refuse_movable,
    refuse_scattered,
)

KIB = 1 << 10
PLAIN = ExtentFlags(0)


def _seat(start: int = 0, unit: int = 4 * KIB) -> Seat:
    return Seat("key", "/dev/ublkb0", unit, DeviceNumber(259, 0), start)


def _extents(*runs: tuple[int, int, int]) -> list[Extent]:
    return [Extent(start, physical, length, PLAIN) for start, physical, length in runs]


def test_neighbours_in_the_file_and_on_the_device_are_one() -> None:
    found = joined(_extents((0, 100, 10), (10, 110, 5), (15, 300, 5), (25, 310, 5)))
    assert [(each.start, each.physical, each.length) for each in found] == [(0, 100, 15), (15, 300, 5), (25, 310, 5)]


def test_pieces_are_cut_inward_to_units_of_the_device() -> None:
    found = cut(_extents((0, 1 * KIB, 16 * KIB)), _seat(), [(0, 16 * KIB)], 4 * KIB)
    assert found == [Piece(3 * KIB, 4 * KIB, 12 * KIB)]


def test_the_start_of_the_partition_counts() -> None:
    found = cut(_extents((0, 0, 16 * KIB)), _seat(start=63 * 512), [(0, 16 * KIB)], 4 * KIB)
    assert found == [Piece(512, 32 * KIB, 12 * KIB)]


def test_what_has_no_room_for_a_unit_is_left_out() -> None:
    runs = _extents((0, 0, 8 * KIB), (8 * KIB, 65 * KIB, 7 * KIB), (15 * KIB, 128 * KIB, 64 * KIB))
    assert cut(runs, _seat(), [(0, 79 * KIB)], 16 * KIB) == [Piece(15 * KIB, 128 * KIB, 64 * KIB)]
    assert cut(runs, _seat(), [(0, 15 * KIB)], 4 * KIB) == [Piece(0, 0, 8 * KIB), Piece(11 * KIB, 68 * KIB, 4 * KIB)]


def test_only_the_ranges_that_were_named() -> None:
    runs = _extents((0, 1 << 20, 1 << 20))
    found = cut(runs, _seat(), [(8 * KIB, 8 * KIB), (64 * KIB, 4 * KIB)], 4 * KIB)
    assert found == [Piece(8 * KIB, (1 << 20) + 8 * KIB, 8 * KIB), Piece(64 * KIB, (1 << 20) + 64 * KIB, 4 * KIB)]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12),
    st.sampled_from([512, 1 * KIB, 4 * KIB]),
    st.sampled_from([512, 4 * KIB, 8 * KIB]),
    st.integers(0, 130),
)
def test_pieces_lie_in_their_extents_and_nowhere_twice(
    runs: list[tuple[int, int]], seat_unit: int, unit: int, partition: int
) -> None:
    block = 1 * KIB
    found: list[Extent] = []
    at, physical = 0, 0
    for gap, length in runs:
        physical += gap * block
        found.append(Extent(at, physical, length * block, PLAIN))
        at += length * block
        physical += length * block
    seat = _seat(partition * 512, seat_unit)
    mapped = {each.start + n: seat.start + each.physical + n for each in found for n in range(0, each.length, 512)}
    taken: set[int] = set()
    for piece in cut(found, seat, [(0, at)], unit):
        assert piece.physical % seat_unit == 0
        assert piece.length % seat_unit == 0
        assert piece.length >= unit
        for n in range(0, piece.length, 512):
            assert mapped.get(piece.offset + n, piece.physical + n) == piece.physical + n
            assert piece.physical + n not in taken
            taken.add(piece.physical + n)
    assert sum(each.length for each in found) - len(taken) * 512 <= len(found) * 2 * max(unit, seat_unit)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        (ExtentFlags.SHARED, "reflink"),
        (ExtentFlags.ENCODED, "compressed or encrypted"),
        (ExtentFlags.INLINE, "within its inode"),
        (ExtentFlags.DELALLOC, "no place on the device"),
        (ExtentFlags.UNKNOWN, "no place on the device"),
    ],
)
def test_extents_that_may_move_are_refused(flag: ExtentFlags, reason: str) -> None:
    with pytest.raises(Unsupported, match=f"/file: .*{reason}"):
        refuse_movable([Extent(0, 0, 4096, flag | ExtentFlags.LAST)], "/file")


def test_unwritten_extents_are_fine() -> None:
    refuse_movable([Extent(0, 0, 4096, ExtentFlags.UNWRITTEN | ExtentFlags.LAST)], "/file")


def test_too_many_and_no_pieces_are_refused() -> None:
    refuse_scattered([Piece(0, 0, 4096)] * MAX_EXTENTS, "/file")
    with pytest.raises(Unsupported, match="4097 pieces"):
        refuse_scattered([Piece(0, 0, 4096)] * (MAX_EXTENTS + 1), "/file")
    with pytest.raises(Unsupported, match="no run of blocks"):
        refuse_scattered([], "/file")
