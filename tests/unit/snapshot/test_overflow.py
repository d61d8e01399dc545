# SPDX-License-Identifier: MIT
"""Policies of a storage that is full: what can be written, and what is said of a snapshot that was lost."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.errors import UsageError
from blksnap_ublk.snapshot.overflow import Action, OnOverflow, explain, parse

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("break", OnOverflow(Action.BREAK)),
        ("evict-oldest", OnOverflow(Action.EVICT_OLDEST)),
        ("pause:1", OnOverflow(Action.PAUSE, 1)),
        ("pause:30", OnOverflow(Action.PAUSE, 30)),
        ("pause:86400", OnOverflow(Action.PAUSE, 86400)),
    ],
)
def test_policies(text: str, policy: OnOverflow) -> None:
    assert parse(text) == policy
    assert str(policy) == text


@given(st.integers(1, 86400))
def test_pauses_survive_the_way(seconds: int) -> None:
    assert str(parse(f"pause:{seconds}")) == f"pause:{seconds}" == str(parse(f"pause:00{seconds}"))


@pytest.mark.parametrize(
    "text",
    [
        "", "Break", "break ", "evict", "evict_oldest", "pause", "pause:", "pause:-1", "pause:1.5", "pause:1s",
        "pause: 1", "pause:0", "pause:86401", "pause:" + "9" * 5000, "pause:\N{ARABIC-INDIC DIGIT THREE}", "break\n",
        "break;break",
    ],
)  # fmt: skip
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--on-overflow ") as caught:
        parse(text)
    assert len(caught.value.message) < 200


@given(st.text())
def test_any_text_is_a_policy_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("policy", "capacity", "limit", "parts"),
    [
        ("break", 1 << 20, None, ["full: 1 MiB, no limit (break)", "more --storage, or --on-overflow pause:SECONDS"]),
        ("break", 12 * GIB, 12 * GIB, ["full: 12 GiB, limit 12 GiB (break)", "a larger --limit"]),
        ("break", 12 * GIB - 4096, 12 * GIB, ["a larger --limit"]),
        ("break", 2 * GIB, 12 * GIB, ["full: 2 GiB, limit 12 GiB", "more --storage"]),
        ("pause:30", GIB, GIB, ["(pause:30)", "a larger --limit, or a longer pause"]),
        ("evict-oldest", GIB, None, ["no older snapshot was left to evict", "more --storage"]),
        ("break", 0, None, ["full: 0 bytes, no limit"]),
        ("break", 4096, 4096, ["full: 4 KiB, limit 4 KiB", "a larger --limit"]),
    ],
)
def test_a_lost_snapshot_is_explained(policy: str, capacity: int, limit: int | None, parts: list[str]) -> None:
    text = explain(policy, capacity, limit)
    assert text.startswith("difference storage was full: ")
    assert all(part in text for part in parts), text
