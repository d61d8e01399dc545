# SPDX-License-Identifier: MIT
"""Sizes as people write them: 4096, 64K, 1G, 2T (powers of 1024), and times: 90, 30s, 10m, 2h, 1d."""

import re

import typer

_UNITS = "KMGTPE"
_SIZE = re.compile(rf"(\d+)([{_UNITS}]?)", re.ASCII | re.IGNORECASE)
_LARGEST = (1 << 63) - 1
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(\d+)([smhd]?)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size. Raises typer.BadParameter."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size: write bytes, or 64K, 1G, 2T")
    number, unit = match.groups()
    size = int(number[:40]) << (10 * (_UNITS.index(unit.upper()) + 1) if unit else 0)
    if size > _LARGEST:
        raise typer.BadParameter(f"{text!r} is too large")
    return size


def parse_range(text: str) -> tuple[int, int]:
    """Start and length in bytes of `START+LENGTH`, both sizes. Raises typer.BadParameter."""
    start, plus, length = text.partition("+")
    if not plus:
        raise typer.BadParameter(f"{text!r} is not a range: write START+LENGTH, in bytes")
    return parse_size(start), parse_size(length)


def parse_time(text: str) -> float:
    """Seconds of a time, more than none. Raises typer.BadParameter."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time: write seconds, or 30s, 10m, 2h, 1d")
    number, unit = match.groups()
    seconds = float(int(number[:20]) * _SECONDS[unit])
    if seconds == 0:
        raise typer.BadParameter(f"{text!r} is no time at all")
    return seconds


def size_text(size: float) -> str:
    """A size for people: `512`, `64K`, `1.5G`."""
    if size < 1024:
        return f"{size:.0f}"
    for unit in _UNITS:
        size /= 1024
        if size < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{size:.1f}".removesuffix(".0") + unit


def duration_text(seconds: float | None) -> str:
    """A time for people: `-` for None, `42 s`, `3 min`, `5.2 h`."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
