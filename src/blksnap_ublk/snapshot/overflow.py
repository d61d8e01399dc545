# SPDX-License-Identifier: MIT
"""What a difference storage does when it is full: the value of `--on-overflow`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from blksnap_ublk.errors import UsageError

PAUSE_SHORTEST = 1.0
PAUSE_LONGEST = 86400.0
"""Seconds."""

_PAUSE = re.compile(r"pause:([0-9]+)", re.ASCII)


class Action(StrEnum):
    """Break the snapshots that lack room at once; let writers wait for room first; destroy older snapshots first."""

    BREAK = "break"
    PAUSE = "pause"
    EVICT_OLDEST = "evict-oldest"


@dataclass(frozen=True)
class OnOverflow:
    """A policy; `str` gives the text that `parse` reads. `seconds`: how long writers wait, with PAUSE only."""

    action: Action
    seconds: float | None = None

    def __str__(self) -> str:
        return self.action.value if self.seconds is None else f"{self.action.value}:{self.seconds:.0f}"


def parse(text: str) -> OnOverflow:
    """The policy of `break`, `pause:SECONDS` (whole seconds, up to a day) or `evict-oldest`. Raises UsageError."""
    match = _PAUSE.fullmatch(text)
    if match is not None:
        # Cut before int(): Python refuses to convert numbers of thousands of digits.
        seconds = float(match[1].lstrip("0")[:10] or "0")
        if not PAUSE_SHORTEST <= seconds <= PAUSE_LONGEST:
            limits = f"from {PAUSE_SHORTEST:.0f} to {PAUSE_LONGEST:.0f} seconds"
            raise UsageError("no time that writers can wait", subject=_option(text), advice=f"give {limits}")
        return OnOverflow(Action.PAUSE, seconds)
    if text not in (Action.BREAK, Action.EVICT_OLDEST):
        raise UsageError("not one of break, pause:SECONDS, evict-oldest", subject=_option(text))
    return OnOverflow(Action(text))


def explain(on_overflow: str, capacity: int, limit: int | None) -> str:
    """Why a snapshot is overflown whose storage, with that policy and limit, had `capacity` bytes; what to do about it.

    Sizes in bytes; `limit` None: there was none.
    """
    text = f"difference storage was full: {_size(capacity)}, "
    text += "no limit" if limit is None else f"limit {_size(limit)}"
    action = on_overflow.partition(":")[0]
    reached = limit is not None and limit - capacity < limit // 64
    more = "a larger --limit" if reached else "more --storage"
    if action == Action.PAUSE:
        return f"{text}, and no room came in a pause ({on_overflow}); next time give it {more}, or a longer pause"
    if action == Action.EVICT_OLDEST:
        return f"{text}, and no older snapshot was left to evict ({on_overflow}); next time give it {more}"
    return f"{text} ({on_overflow}); next time give it {more}, or --on-overflow pause:SECONDS or evict-oldest"


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or count % 1024:
            return f"{count} {unit}"
        count //= 1024
    return f"{count} TiB"


def _option(text: str) -> str:
    shown = text if text.isprintable() else repr(text)
    return f"--on-overflow {shown[:60]}"
