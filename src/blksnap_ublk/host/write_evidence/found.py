# SPDX-License-Identifier: MIT
"""What one kind of file system shows of the writes to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """A file system of `kind`, and `content`, which is other bytes once somebody has written; None where `objection`
    says why it shows nothing. `written`: unix time, in seconds, of its last write, where that is part of the content.
    """

    kind: str
    content: bytes | None
    objection: str | None
    written: int | None = None
