# SPDX-License-Identifier: MIT
"""Cursors are read as they are written, and what is no cursor is refused with the reason."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blksnap_ublk.cbt import Cursor

GENERATION = UUID("0e3cbf25-61f4-4c0b-8b7a-7f2fd7f0d9a1")


@settings(deadline=None)
@given(st.uuids(), st.integers(0, 10**18 - 1))
def test_reads_what_it_writes(generation: UUID, number: int) -> None:
    cursor = Cursor(generation, number)
    assert Cursor.parse(str(cursor)) == cursor
    assert Cursor.parse(str(cursor).upper()) == cursor


@pytest.mark.parametrize("number", ["0", "3", "255"])
def test_bare_number_is_refused_with_the_reason(number: str) -> None:
    with pytest.raises(ValueError, match="bare number: it would be silently wrong after a lost history"):
        Cursor.parse(number)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "form GENERATION:NUMBER"),
        ("none", "form GENERATION:NUMBER"),
        (str(GENERATION), "form GENERATION:NUMBER"),
        (":3", "not a UUID"),
        ("7:3", "not a UUID"),
        (f"{{{GENERATION}}}:3", "not a UUID"),
        (f"{GENERATION.hex}:3", "not a UUID"),
        (f"{GENERATION}:", "not a change number"),
        (f"{GENERATION}:-1", "not a change number"),
        (f"{GENERATION}:+1", "not a change number"),
        (f"{GENERATION}:01", "not a change number"),
        (f"{GENERATION}:1 ", "not a change number"),
        (f"{GENERATION}:1:2", "not a change number"),
        (f"{GENERATION}:\N{ARABIC-INDIC DIGIT THREE}", "not a change number"),
        (f"{GENERATION}:{'9' * 5000}", "not a change number"),
    ],
)
def test_malformed_cursors(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        Cursor.parse(text)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_cursor_or_a_value_error(text: str) -> None:
    try:
        cursor = Cursor.parse(text)
    except ValueError:
        return
    assert str(cursor) == text.lower()
