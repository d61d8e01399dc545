# SPDX-License-Identifier: MIT
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.errors import UsageError
from blksnap_ublk.snapshot.spec import SectorRange, Spec, check_disjoint, parse_spec, parse_specs, whole


@pytest.mark.parametrize(
    ("text", "path", "ranges"),
    [
        ("/dev/sdb", "/dev/sdb", None),
        ("/f:0+8", "/f", [(0, 8)]),
        ("/f:0+8,8+8,100+1", "/f", [(0, 8), (8, 8), (100, 1)]),
        ("/f:100+1,0+8", "/f", [(100, 1), (0, 8)]),
        ("/f:1+2:3+4", "/f:1+2", [(3, 4)]),
        ("/a b,c:0+8", "/a b,c", [(0, 8)]),
        ("/line\nend:0+8", "/line\nend", [(0, 8)]),
        ("/f:007+08", "/f", [(7, 8)]),
        ("/dev/disk/by-path/pci-0000:00:1f.2-ata-1", "/dev/disk/by-path/pci-0000:00:1f.2-ata-1", None),
        ("/f:10", "/f:10", None),
        ("/f:1-2", "/f:1-2", None),
        ("/f:٣+٤", "/f:٣+٤", None),
        ("/c++", "/c++", None),
    ],
)
def test_the_ranges_are_what_matches_at_the_end(text: str, path: str, ranges: list[tuple[int, int]] | None) -> None:
    expected = None if ranges is None else tuple(SectorRange(*each) for each in ranges)
    assert parse_spec(text) == Spec(path, expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty SPEC"),
        (":0+8", "names no file"),
        ("/f:0+8,", "not a list START"),
        ("/f:0+", "not a list START"),
        ("/f:+8", "not a list START"),
        ("/f:0+8, 16+8", "not a list START"),
        ("/f:0+8+8", "not a list START"),
        ("/f:0+0", "is empty"),
        ("/f:0+8,4+8", "overlap"),
        ("/f:4+8,0+8", "overlap"),
        ("/f:0+8,0+8", "overlap"),
        ("/f:18014398509481984+1", "beyond any device"),
        ("/f:1+" + "9" * 5000, "beyond any device"),
        ("/f\0:0+8", "NUL"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_spec(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_storage_file_is_never_split() -> None:
    assert whole("/f:0+8") == Spec("/f:0+8")
    assert parse_specs(["/g:0+8"], ["/f:0+8", "/h:0+,"]) == [
        Spec("/g", (SectorRange(0, 8),)),
        Spec("/f:0+8"),
        Spec("/h:0+,"),
    ]
    with pytest.raises(UsageError):
        whole("")


@pytest.mark.parametrize("texts", [["/f:0+8", "/f:7+1"], ["/f", "/f"], ["/f", "/f:0+8"], ["/a/../f:0+8", "/f:0+8"]])
def test_specs_that_overlap_one_another_are_refused(texts: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^/f: "):
        parse_specs(texts)


def test_specs_that_touch_are_accepted() -> None:
    assert len(parse_specs(["/f:0+8", "/f:8+8", "/g:0+8", "/dev/sdb"])) == 4


def test_a_relative_path_is_taken_from_where_it_was_written() -> None:
    assert str(parse_spec("diff:0+8").absolute("/home/x")) == "/home/x/diff:0+8"
    assert str(parse_spec("/diff").absolute("/home/x")) == "/diff"


RANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 20)), min_size=1, max_size=6)
PATHS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1)


@given(PATHS, RANGES)
def test_what_is_written_is_read_back(path: str, gaps: list[tuple[int, int]]) -> None:
    position = 0
    ranges = []
    for gap, count in gaps:
        ranges.append(SectorRange(position + gap, count))
        position += gap + count
    spec = Spec(path, tuple(ranges))
    assert parse_spec(str(spec)) == spec


@given(st.text())
def test_any_text_is_a_spec_or_an_error_of_one_line(text: str) -> None:
    lines = 1
    try:
        spec = parse_spec(text)
        check_disjoint([spec])
    except UsageError as error:
        lines = len(str(error).splitlines())
    assert lines == 1


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=5))
def test_exactly_the_overlapping_ranges_are_refused(ranges: list[tuple[int, int]]) -> None:
    sectors = [sector for start, count in ranges for sector in range(start, start + count)]
    text = "/f:" + ",".join(f"{start}+{count}" for start, count in ranges)
    if len(set(sectors)) == len(sectors):
        parse_spec(text)
    else:
        with pytest.raises(UsageError):
            parse_spec(text)
