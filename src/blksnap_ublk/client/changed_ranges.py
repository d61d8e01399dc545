# SPDX-License-Identifier: MIT
"""The answer to "what changed" with its ranges as an array."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.errors import Failed
from blksnap_ublk.forms import Changes


@dataclass(frozen=True)
class ChangedRanges:
    """The form Changes with `ranges` of shape (n, 2): byte start and byte length, sorted, not touching one another."""

    device: str
    since: str | None
    until: str
    tracking_block: int
    all: bool
    reason: str | None
    changed_bytes: int
    ranges: NDArray[np.int64]


def joined(portions: Iterable[Changes]) -> ChangedRanges:
    """One answer from its portions, which differ in their ranges only. Raises Failed when there are none."""
    form: Changes | None = None
    parts = []
    for form in portions:
        parts.append(np.array([(r.start, r.length) for r in form.ranges], dtype=np.int64).reshape(-1, 2))
    if form is None:
        raise Failed("the daemon gave no answer")
    return ChangedRanges(
        device=form.device,
        since=form.since,
        until=form.until,
        tracking_block=form.tracking_block,
        all=form.all,
        reason=form.reason,
        changed_bytes=form.changed_bytes,
        ranges=np.concatenate(parts),
    )
