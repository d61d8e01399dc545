# SPDX-License-Identifier: MIT
"""The cursor: what a backup remembers of the instant it has copied."""

from __future__ import annotations

import re
from dataclasses import dataclass
from uuid import UUID

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Cursor:
    """A generation of the history and a change number in it; written `GENERATION:NUMBER`."""

    generation: UUID
    number: int

    def __str__(self) -> str:
        return f"{self.generation}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read `GENERATION:NUMBER`. Raises ValueError, whose text says what is wrong and what to give instead."""
        shown = repr(text if len(text) <= 80 else text[:77] + "...")
        if _NUMBER.fullmatch(text):
            raise ValueError(
                f"{shown} is a bare number: it would be silently wrong after a lost history; "
                "give the whole cursor, GENERATION:NUMBER"
            )
        generation, colon, number = text.partition(":")
        if not colon:
            raise ValueError(f"{shown} is no cursor: it has the form GENERATION:NUMBER")
        if not _UUID.fullmatch(generation):
            raise ValueError(f"{shown} is no cursor: the part before the colon is not a UUID")
        if not _NUMBER.fullmatch(number):
            raise ValueError(f"{shown} is no cursor: the part after the colon is not a change number (0, 1, 2 ...)")
        return cls(UUID(generation), int(number))
