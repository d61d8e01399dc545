# SPDX-License-Identifier: MIT
"""A figure of several turns: its median, and the quartiles around it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return Spread(middle, low, high)


def spread_of_ratios(one: Sequence[float], other: Sequence[float]) -> Spread:
    """Each turn is one pair."""
    return spread([a / b for a, b in zip(one, other, strict=True)])
