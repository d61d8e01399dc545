# SPDX-License-Identifier: MIT
"""The backlog of events: numbered in one row, bounded, the same after a restart."""

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from blksnap_ublk.daemon import events
from blksnap_ublk.daemon.events import BATCH, EventLog
from blksnap_ublk.daemon.forecast import Forecasts
from blksnap_ublk.forms import Event


def numbers(events: list[Event]) -> list[int]:
    return [event.seq for event in events]


async def collected(log: EventLog, since: int | None, snapshot: str | None = None) -> list[Event]:
    return [event async for batch in log.follow(since, follow=False, snapshot=snapshot) for event in batch.events]


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    log.emit("attached", device="/dev/ublkb0", name="sdb")
    log.emit("taken", snapshot="s")
    again = EventLog(tmp_path / "events")
    again.emit("destroyed", snapshot="s")
    assert numbers(again.after(None)) == [1, 2, 3]
    assert again.after(None)[:2] == log.after(None)
    assert numbers(again.after(2)) == [3]
    assert again.after(3) == []


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    log.emit("one")
    log.emit("two")
    path = tmp_path / "events"
    path.write_bytes(path.read_bytes()[:-5])
    again = EventLog(path)
    assert numbers(again.after(None)) == [1]
    again.emit("three")
    assert numbers(EventLog(path).after(None)) == [1, 2]


def test_the_backlog_is_bounded_and_names_what_is_lost(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events", backlog=10)
    for n in range(95):
        log.emit("one", n=n)
    assert numbers(log.after(None)) == list(range(86, 96))
    lost, *rest = log.after(3)
    assert (lost.type, lost.seq) == ("lost", 85)
    assert lost.data == {"first": 4, "last": 85, "reason": "backlog"}
    assert numbers(rest) == list(range(86, 96))
    assert numbers(log.after(90)) == list(range(91, 96))
    assert len((tmp_path / "events").read_bytes().splitlines()) <= 20


def test_events_of_one_snapshot(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    for snapshot in ("a", "b", "a"):
        log.emit("taken", snapshot=snapshot)
    assert numbers(asyncio.run(collected(log, None, "a"))) == [1, 3]


def test_the_end_of_a_snapshot_is_found(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    for kind, snapshot in (
        ("taken", "abcd-1"),
        ("evicted", "abcd-1"),
        ("destroyed", "abcd-1"),
        ("destroyed", "abce-2"),
    ):
        log.emit(kind, snapshot=snapshot)
    log.emit("attached")
    ends = [log.end_of(text) for text in ("abcd", "abce-2", "ffff")]
    assert [end and (end.type, end.seq) for end in ends] == [("evicted", 2), ("destroyed", 4), None]


def test_batches_say_where_to_go_on(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    for n in range(3 * BATCH + 5):
        log.emit("taken", snapshot="s" if n == 0 else "other")

    async def batches(since: int | None, snapshot: str | None = None) -> list[tuple[int, int]]:
        return [(len(each.events), each.seq) async for each in log.follow(since, follow=False, snapshot=snapshot)]

    assert asyncio.run(batches(None)) == [(0, 0), (64, 64), (64, 128), (64, 192), (5, 197)]
    assert asyncio.run(batches(190)) == [(0, 190), (7, 197)]
    assert asyncio.run(batches(197)) == [(0, 197)]
    assert asyncio.run(batches(None, "s")) == [(0, 0), (1, 64), (0, 128), (0, 192)], "it is told now and then"


def test_who_follows_gets_what_comes_from_other_threads(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    log.emit("before")

    async def follow() -> list[Event]:
        stream = log.follow(None, follow=True)
        assert (await anext(stream)).seq == 1
        found: list[Event] = []
        for kind in ("one", "two"):
            await asyncio.to_thread(log.emit, kind)
            found += (await asyncio.wait_for(anext(stream), 30)).events
        await stream.aclose()
        return found

    assert [event.type for event in asyncio.run(follow())] == ["one", "two"]


def test_nothing_is_missed_between_the_first_batch_and_the_next(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")

    async def follow() -> list[int]:
        stream = log.follow(None, follow=True)
        await anext(stream)
        await asyncio.to_thread(log.emit, "one")
        log.emit("two")
        found = numbers((await asyncio.wait_for(anext(stream), 30)).events)
        await stream.aclose()
        return found

    assert asyncio.run(follow()) == [1, 2]


def test_numbering_that_began_anew_is_told(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    log.emit("one")
    log.emit("two")
    assert numbers(log.after(2)) == []
    told, *rest = log.after(700)
    assert (told.type, told.seq) == ("lost", 0)
    assert told.data == {"first": 701, "last": None, "reason": "restarted"}
    assert numbers(rest) == [1, 2]


def test_a_hole_in_the_file_is_told(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    for n in range(6):
        log.emit("one", n=n)
    lines = (tmp_path / "events").read_bytes().splitlines(keepends=True)
    (tmp_path / "events").write_bytes(b"".join([*lines[:2], b"no JSON\n", *lines[4:]]))
    found = EventLog(tmp_path / "events").after(0)
    assert [(event.type, event.seq) for event in found[1:4]] == [("one", 2), ("lost", 4), ("one", 5)]
    assert found[2].data == {"first": 3, "last": 4, "reason": "backlog"}


class Full:
    """A file system that has no room: the file of events cannot be opened to be written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __enter__(self) -> None:
        true_open = Path.open

        def refuse(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if "b" in mode and mode != "rb":
                raise OSError(errno.ENOSPC, "no room")
            return true_open(path, mode, *arguments, **options)

        self._monkeypatch.setattr(Path, "open", refuse)

    def __exit__(self, *_: object) -> None:
        self._monkeypatch.undo()


def test_a_full_state_directory_loses_nothing_while_the_process_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events"
    log = EventLog(path)
    log.emit("one")
    with Full(monkeypatch):
        log.emit("two")
        log.emit("three")
    assert numbers(log.after(1)) == [2, 3]
    assert not path.exists()
    monkeypatch.setattr(events, "_REPAIR_SECONDS", 0.0)
    log.emit("four")
    again = EventLog(path)
    assert [event.type for event in again.after(None)] == ["one", "two", "three", "four"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"events"}


def test_events_that_only_a_dead_process_knew_are_told_to_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events"
    log = EventLog(path)
    log.emit("one")
    with Full(monkeypatch):
        log.emit("two")
        again = EventLog(path)  # it is full at the next start, too
    again.emit("other")
    one, lost, other = again.after(None)
    assert (one.type, lost.type, other.type) == ("one", "lost", "other")
    assert other.seq > 2
    assert lost.data == {"first": 2, "last": other.seq - 1, "reason": "backlog"}
    assert [event.type for event in again.after(2)] == ["lost", "other"], "whoever knew event two is told"
    monkeypatch.setattr(events, "_REPAIR_SECONDS", 0.0)
    again.emit("more")
    third = EventLog(path)
    third.emit("last")
    assert numbers(third.after(other.seq)) == [other.seq + 1, other.seq + 2]


def test_no_number_twice_however_often_it_starts_while_the_state_directory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events"
    log = EventLog(path)
    log.emit("one")
    with Full(monkeypatch):
        log.emit("in memory")
        second = EventLog(path)
        for _ in range(5):
            second.emit("second")
        heard = second.after(None)[-1].seq
        third = EventLog(path)
        for _ in range(8):
            third.emit("third")
    assert [event.type for event in third.after(heard)] == ["lost"] + ["third"] * 8
    assert third.after(heard)[0].data["first"] == heard + 1


def test_a_forecast_counts_what_is_taken_and_not_what_is_given_back() -> None:
    forecasts = Forecasts()
    for used in (0, 50, 20, 60):
        forecasts.read("s", used)
    assert forecasts.seconds_left("s", 60, 100) is not None
    forecasts.read("s", 0)
    assert forecasts.seconds_left("s", 0, 100) is not None


def test_a_storage_that_does_not_fill_has_no_forecast() -> None:
    forecasts = Forecasts()
    assert forecasts.seconds_left("s", 0, 100) is None
    forecasts.read("s", 10)
    assert forecasts.seconds_left("s", 10, 100) is None
    left = forecasts.seconds_left("s", 60, 100)
    assert left is not None
    assert left >= 0
    forecasts.keep_only(set())
    assert forecasts.seconds_left("s", 60, 100) is None
