# SPDX-License-Identifier: MIT
"""What a user writes to name difference storage: `PATH` or `PATH:START+COUNT[,START+COUNT…]`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from blksnap_ublk.errors import UsageError

SECTOR = 512
_MAX_SECTORS = (1 << 63) // SECTOR

_WITH_RANGES = re.compile(r"(?P<path>.*):(?P<ranges>[0-9]+\+[0-9]+(?:,[0-9]+\+[0-9]+)*)", re.DOTALL)
# A tail of nothing but digits, plus signs, commas and blanks was meant to be ranges: taken for a path, a file of that
# name could come into being.
_ATTEMPT = re.compile(r".*:(?P<ranges>[0-9+, ]*\+[0-9+, ]*)", re.DOTALL)


@dataclass(frozen=True, order=True)
class SectorRange:
    """Sectors `start` to `start + count` (of 512 bytes)."""

    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    def __str__(self) -> str:
        return f"{self.start}+{self.count}"


@dataclass(frozen=True)
class Spec:
    """Sector ranges of a file or a block device, in the order given; `ranges` None: all of PATH."""

    path: str
    ranges: tuple[SectorRange, ...] | None = None

    def __str__(self) -> str:
        if self.ranges is None:
            return self.path
        return f"{self.path}:{','.join(map(str, self.ranges))}"

    def absolute(self, directory: str) -> Spec:
        """The same with a path that does not depend on the working directory; `directory` is where it was written."""
        return replace(self, path=os.path.normpath(os.path.join(directory, self.path)))


def parse_spec(text: str) -> Spec:
    """The SPEC of `--storage`; the ranges are what matches at the end of the text.

    Raises UsageError when it names nothing, a range is empty or too far, or two of its ranges overlap.
    """
    match = _WITH_RANGES.fullmatch(text)
    if match is None:
        attempt = _ATTEMPT.fullmatch(text)
        if attempt is not None:
            raise UsageError(
                f"{attempt['ranges']!r} is not a list START+COUNT[,START+COUNT…] of sectors",
                subject=_shown(text),
                advice="a path that ends like this is given by --storage-file",
            )
        return whole(text)
    path = _checked_path(match["path"], text)
    ranges = tuple(_range(part, text) for part in match["ranges"].split(","))
    for first, second in pairwise(sorted(ranges)):
        if second.start < first.end:
            raise UsageError(f"the ranges {first} and {second} overlap", subject=_shown(text))
    return Spec(path, ranges)


def whole(path: str) -> Spec:
    """All of PATH, never split: the value of `--storage-file`. Raises UsageError when it is no path."""
    return Spec(_checked_path(path, path))


def parse_specs(storage: Sequence[str], storage_files: Sequence[str] = ()) -> list[Spec]:
    """The SPECs of all `--storage`, then of all `--storage-file`. Raises UsageError also where two of them overlap."""
    specs = [parse_spec(text) for text in storage] + [whole(path) for path in storage_files]
    check_disjoint(specs)
    return specs


def check_disjoint(specs: Sequence[Spec]) -> None:
    """Raises UsageError when two SPECs name the same sectors of the same path."""
    by_path: dict[str, list[Spec]] = {}
    for spec in specs:
        by_path.setdefault(os.path.normpath(spec.path), []).append(spec)
    for path, same in by_path.items():
        if len(same) > 1 and any(spec.ranges is None for spec in same):
            raise UsageError("named twice", subject=_shown(path), advice="name it once")
        ranges = sorted(each for spec in same for each in spec.ranges or ())
        for first, second in pairwise(ranges):
            if second.start < first.end:
                raise UsageError(f"the ranges {first} and {second} overlap", subject=_shown(path))


def _range(part: str, text: str) -> SectorRange:
    # Cut before int(): Python refuses to convert numbers of thousands of digits.
    start, count = (int(number.lstrip("0")[:20] or "0") for number in part.split("+"))
    if count == 0:
        raise UsageError(f"the range {_shown(part)} is empty", subject=_shown(text))
    if start + count > _MAX_SECTORS:
        raise UsageError(f"the range {_shown(part)} lies beyond any device", subject=_shown(text))
    return SectorRange(start, count)


def _checked_path(path: str, text: str) -> str:
    if not path:
        raise UsageError("names no file, directory or block device", subject=_shown(text) or "an empty SPEC")
    if "\0" in path:
        raise UsageError("a path cannot contain a NUL character", subject=_shown(text))
    return path


def _shown(text: str) -> str:
    """`text` as an error may quote it: on one line, with no control characters, not endless."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 200 else shown[:200] + "…"
