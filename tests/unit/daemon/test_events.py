# SPDX-License-Identifier: MIT
"""The backlog of events: numbered in one row, bounded, the same after a restart."""

import asyncio
from pathlib import Path

from blksnap_ublk.daemon.events import EventLog
from blksnap_ublk.daemon.forecast import Forecasts
from blksnap_ublk.forms import Event


def numbers(events: list[Event]) -> list[int]:
    return [event.seq for event in events]


async def collected(log: EventLog, since: int | None, snapshot: str | None = None) -> list[Event]:
    return [event async for event in log.follow(since, follow=False, snapshot=snapshot)]


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
    assert (lost.type, lost.data) == ("lost", {"first": 4, "last": 85})
    assert numbers(rest) == list(range(86, 96))
    assert numbers(log.after(90)) == list(range(91, 96))
    assert len((tmp_path / "events").read_bytes().splitlines()) <= 20


def test_events_of_one_snapshot(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    for snapshot in ("a", "b", "a"):
        log.emit("taken", snapshot=snapshot)
    assert numbers(asyncio.run(collected(log, None, "a"))) == [1, 3]


def test_who_follows_gets_what_comes_from_other_threads(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    log.emit("before")

    async def follow() -> list[Event]:
        found: list[Event] = []
        stream = log.follow(None, follow=True)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await asyncio.to_thread(log.emit, "one")
        found.append(await asyncio.wait_for(first, 30))
        await asyncio.to_thread(log.emit, "two")
        found.append(await asyncio.wait_for(anext(stream), 30))
        await stream.aclose()
        return found

    assert [event.type for event in asyncio.run(follow())] == ["one", "two"]


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
