# SPDX-License-Identifier: MIT
"""Sizes as people write them: 4096, 64K, 1G, 2T (powers of 1024)."""

import re

import typer

_UNITS = "KMGTPE"
_SIZE = re.compile(rf"(\d+)([{_UNITS}]?)", re.ASCII | re.IGNORECASE)
_LARGEST = (1 << 63) - 1


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
