# SPDX-License-Identifier: MIT
"""What a queue has counted since its start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from blksnap_ublk.engine._engine import ffi


@dataclass(frozen=True)
class Counters:
    """Requests, except where bytes are named."""

    reads: int = 0
    writes: int = 0
    discards: int = 0
    copies: int = 0
    """Copies begun."""
    copied: int = 0
    """Bytes preserved."""
    waits: int = 0
    """Requests that waited for a claim."""
    parked: int = 0
    """Requests that waited at the gate."""
    rereads: int = 0
    """Image reads done again."""

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def read_counters(function: Callable[[Any, Any], None], queue: Any) -> Counters:
    """Calls the C function that fills in a struct bsu_queue_counters."""
    out = ffi.new("struct bsu_queue_counters *")
    function(queue, out)
    return Counters(*(getattr(out, each.name) for each in fields(Counters)))
