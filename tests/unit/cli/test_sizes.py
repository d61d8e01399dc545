# SPDX-License-Identifier: MIT
"""Sizes as people write and read them."""

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.cli.sizes import duration_text, parse_range, parse_size, parse_time, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64K", 65536), ("64k", 65536), ("1M", 1 << 20), ("1G", 1 << 30), ("2T", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "+1", "1.5G", "1 G", "1KB", "0x10", "1_000", "٣", "9E", "9" * 5000])
def test_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except typer.BadParameter as error:
        assert len(error.message) < 200  # noqa: PT017
    else:
        assert 0 <= size < 1 << 63


@pytest.mark.parametrize(("text", "seconds"), [("1", 1), ("30s", 30), ("10m", 600), ("2h", 7200), ("1d", 86400)])
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0", "0d", "-1", "1.5h", "1 h", "1h30m", "1w", "1M", "٣s", "inf", "nan"])
def test_no_times(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_time(text)


@given(st.text(max_size=20) | st.from_regex(r"[0-9]{1,5000}[smhd]?", fullmatch=True))
def test_any_text_is_a_time_or_refused(text: str) -> None:
    try:
        seconds = parse_time(text)
    except typer.BadParameter:
        return
    assert 1 <= seconds < 1e26


def test_ranges() -> None:
    assert parse_range("1M+64K") == (1 << 20, 65536)
    for text in ("", "1", "+", "1+", "+1", "1+2+3", "a+b"):
        with pytest.raises(typer.BadParameter):
            parse_range(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1023, "1023"), (1024, "1K"), (1536, "1.5K"), ((1 << 20) - 1, "1M"), (1 << 30, "1G"), (5 << 60, "5E")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert size_text(size) == text


def test_times_for_people() -> None:
    assert [duration_text(seconds) for seconds in (None, 0, 90.4, 600, 10_000)] == [
        "-",
        "0 s",
        "90 s",
        "10 min",
        "2.8 h",
    ]
