# SPDX-License-Identifier: MIT
"""The commands about difference storage, and what they say of it, on a real device that is written to meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from blksnap_ublk.client import Client
from blksnap_ublk.errors import BlksnapError
from tests.direct_io import write_at
from tests.filtered import Filtered, filtered, granted_ways
from tests.fio_load import fio_load
from tests.loop_devices import loop_device, mounted
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
SIZE = 64 * MIB
NO_SNAPSHOT = "00000000-0000-4000-8000-000000000000"
WAY = granted_ways()[-1]
SECRET = b"what must not be found in a difference storage that was given back" * 62 + b"...."
assert len(SECRET) == 4096


@pytest.fixture
def disk(client: Client, folder: Path) -> Iterator[Filtered]:
    """A filtered device full of secrets."""
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, WAY, folder) as found:
        fill(found.path, SECRET * 256)
        yield found


def fill(path: str, data: bytes, size: int = SIZE) -> None:
    """Writes a MiB again and again."""
    for at in range(0, size, MIB):
        write_at(path, at, data)


def good(daemon: OwnDaemon, *arguments: str) -> Any:
    """The JSON document of a command that is to succeed."""
    done = daemon.cli(*arguments, "--json")
    assert done.returncode == 0, f"{done.stderr}{daemon.log()}"
    return json.loads(done.stdout)


def refused(daemon: OwnDaemon, code: int, *arguments: str) -> str:
    """The one line on stderr of a command that must end with `code`."""
    before = daemon.state()
    done = daemon.cli(*arguments)
    assert (done.returncode, done.stdout) == (code, ""), f"{done.stderr}{daemon.log()}"
    assert done.stderr.count("\n") == 1
    assert daemon.state() == before, "something was left over"
    return done.stderr


def take(daemon: OwnDaemon, disk: Filtered, *options: str) -> str:
    """A snapshot by the command line; its id."""
    return str(good(daemon, "snapshot", "create", disk.path, "--no-freeze", *options)["id"])


def kinds(daemon: OwnDaemon, snapshot: str) -> list[str]:
    """The types of the events of a snapshot."""
    lines = daemon.cli("events", "--snapshot", snapshot).stdout.splitlines()
    return [json.loads(line)["type"] for line in lines]


def file_of(folder: Path, size: int, name: str = "difference") -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    return path


def test_storage_is_shown_and_made_larger(daemon: OwnDaemon, disk: Filtered, folder: Path) -> None:
    copy = disk.copy()
    first, odd = file_of(folder, 4 * MIB), file_of(folder, 4 * MIB, "odd:0+8")
    with loop_device(folder / "more", 64 * MIB) as more:
        snapshot = take(daemon, disk, "--storage", f"{first}:0+2048", "--limit", "1M")
        shown = good(daemon, "storage", "show", snapshot[:8])
        assert shown == good(daemon, "snapshot", "show", snapshot)["storage"]
        assert (shown["capacity"], shown["limit"], shown["on_overflow"]) == (MIB, MIB, "break")
        assert (shown["wipe"], shown["copy_rate"], shown["waiting"], shown["growing"]) == (False, None, 0, False)
        assert shown["areas"] == [{"path": str(first), "start": 0, "count": 2048, "used": 0}]

        added = good(
            daemon, "storage", "add", snapshot, f"{first}:4096+2048", f"{more}:8+131064", "--storage-file", str(odd)
        )
        assert [(area["path"], area["start"], area["count"]) for area in added["areas"]] == [
            (str(first), 0, 2048),
            (str(first), 4096, 2048),
            (more, 8, 131064),
            (str(odd), 0, 8192),
        ]
        assert added["capacity"] == 2 * MIB + 131064 * 512 + 4 * MIB
        fill(disk.path, os.urandom(MIB))
        after = good(daemon, "storage", "show", snapshot)
        assert after["used"] == SIZE == sum(area["used"] for area in after["areas"])
        assert all(area["used"] for area in after["areas"][:3])
        assert good(daemon, "snapshot", "check", snapshot)["trusted"]
        disk.expect_equal(good(daemon, "snapshot", "show", snapshot)["images"][0]["image"], copy)
        assert good(daemon, "storage", "limit", snapshot, "2G")["limit"] == 2 << 30
        for part in ("limit        2G", "on overflow  break", str(first), more, snapshot):
            assert part in daemon.cli("storage", "show", snapshot).stdout
        good(daemon, "snapshot", "destroy", snapshot)
        assert (first.stat().st_size, odd.stat().st_size) == (4 * MIB, 4 * MIB)


def test_what_cannot_be(daemon: OwnDaemon, disk: Filtered, folder: Path) -> None:
    storage = file_of(folder, 2 * MIB)
    create = ("snapshot", "create", disk.path, "--no-freeze", "--storage", str(storage))
    assert "give from 1 to 86400 seconds" in refused(daemon, 2, *create, "--on-overflow", "pause:0")
    assert "--copy-rate" in refused(daemon, 2, *create, "--copy-rate", "4K")
    snapshot = take(daemon, disk, "--storage", f"{storage}:0+2048")
    joined = ("snapshot", "create", disk.path, "--storage", f"@{snapshot}")
    for option in (["--wipe"], ["--copy-rate", "1M"], ["--on-overflow", "pause:5"]):
        assert "joins the storage" in refused(daemon, 2, *joined, *option)
    for command in (["show"], ["add", str(storage)], ["limit", "1G"], ["rate", "none"]):
        refused(daemon, 3, "storage", command[0], NO_SNAPSHOT, *command[1:])
        refused(daemon, 2, "storage", command[0], "ff", *command[1:])
    refused(daemon, 2, "storage", "add", snapshot)
    refused(daemon, 2, "storage", "add", snapshot, f"{storage}:0+99999999")
    refused(daemon, 2, "storage", "add", snapshot, f"{storage}:2048+8,2052+8")
    refused(daemon, 4, "storage", "add", snapshot, f"{storage}:0+8")
    refused(daemon, 5, "storage", "add", snapshot, disk.path)
    refused(daemon, 2, "storage", "limit", snapshot, "0")
    refused(daemon, 2, "storage", "rate", snapshot, "64K")
    assert good(daemon, "storage", "show", snapshot)["capacity"] == MIB
    assert storage.stat().st_size == 2 * MIB


def test_writers_that_wait_are_shown_and_go_on_when_storage_is_added(
    daemon: OwnDaemon, disk: Filtered, folder: Path
) -> None:
    copy = disk.copy()
    storage = file_of(folder, 128 * MIB)
    snapshot = take(daemon, disk, "--storage", f"{storage}:0+4096", "--on-overflow", "pause:600")
    with fio_load(disk.path, size="32m") as load:
        wait_until("somebody waits", lambda: good(daemon, "storage", "show", snapshot)["waiting"] > 0)
        assert "wait for room" in daemon.cli("snapshot", "show", snapshot).stdout
        assert kinds(daemon, snapshot)[-1] == "storage-waiting"
        assert good(daemon, "storage", "add", snapshot, f"{storage}:4096+131072")["capacity"] == 66 * MIB
        load.wait_for_round()
    assert good(daemon, "storage", "show", snapshot)["waiting"] == 0
    disk.expect_equal(good(daemon, "snapshot", "show", snapshot)["images"][0]["image"], copy)


def test_copies_can_be_slowed_down_and_let_go(daemon: OwnDaemon, disk: Filtered, folder: Path) -> None:
    copy = disk.copy()
    storage = file_of(folder, 72 * MIB)
    snapshot = take(daemon, disk, "--storage", str(storage), "--copy-rate", "1M")
    assert good(daemon, "storage", "show", snapshot)["copy_rate"] == MIB
    with fio_load(disk.path, size="32m") as load:
        wait_until("something was copied", lambda: good(daemon, "storage", "show", snapshot)["used"] > 0)
        assert load.rounds == 0, "32 MiB at 1 MiB a second"
        assert good(daemon, "storage", "rate", snapshot, "none")["copy_rate"] is None
        load.wait_for_round()
    disk.expect_equal(good(daemon, "snapshot", "show", snapshot)["images"][0]["image"], copy)


def test_a_snapshot_that_is_lost(daemon: OwnDaemon, disk: Filtered, folder: Path) -> None:
    storage = file_of(folder, 2 * MIB)
    snapshot = take(daemon, disk, "--storage", str(storage), "--limit", "2M")
    fill(disk.path, os.urandom(MIB), 8 * MIB)
    shown = good(daemon, "snapshot", "show", snapshot)
    assert shown["state"] == "overflown"
    assert shown["created"] < shown["lost_at"]
    assert shown["error"].startswith(
        "difference storage was full: 2 MiB, limit 2 MiB (break); next time give it a larger"
    )
    assert good(daemon, "snapshot", "show", snapshot) == shown
    assert shown["lost_at"] in daemon.cli("snapshot", "list").stdout
    assert shown["error"] in daemon.cli("snapshot", "show", snapshot).stdout
    assert shown["error"] in refused(daemon, 6, "snapshot", "check", snapshot)
    assert kinds(daemon, snapshot).count("overflow") == 1
    assert "overflown" in refused(daemon, 1, "storage", "add", snapshot, str(folder))


def test_a_snapshot_that_was_evicted_is_remembered(daemon: OwnDaemon, disk: Filtered, folder: Path) -> None:
    storage = file_of(folder, 8 * MIB)
    old = take(daemon, disk, "--storage", f"{storage}:0+16384", "--on-overflow", "evict-oldest")
    fill(disk.path, os.urandom(MIB), 6 * MIB)
    copy = disk.copy()
    new = take(daemon, disk, "--storage", f"@{old}")
    fill(disk.path, os.urandom(MIB), 6 * MIB)
    wait_until("it has gone", lambda: kinds(daemon, old)[-1] == "destroyed")
    assert kinds(daemon, old)[-2:] == ["evicted", "destroyed"]
    line = refused(daemon, 3, "snapshot", "show", old)
    assert "no such snapshot any more, it was evicted at 20" in line
    assert f"events --snapshot {old}" in line
    disk.expect_equal(good(daemon, "snapshot", "show", new)["images"][0]["image"], copy)


@contextmanager
def storage_places(folder: Path) -> Iterator[list[tuple[str, Path]]]:
    """SPECs of some kinds of storage, and where to look for what they held."""
    with (
        loop_device(folder / "block", 8 * MIB) as block,
        loop_device(folder / "system", 64 * MIB) as system,
        mounted(system, folder / "mnt") as mnt,
    ):
        on_disk = file_of(mnt, 8 * MIB)
        os.sync()
        in_memory = file_of(folder, 8 * MIB)
        yield [(block, folder / "block"), (str(on_disk), folder / "system"), (str(in_memory), in_memory)]


@pytest.mark.parametrize("wipe", [True, False], ids=["wiped", "left"])
@pytest.mark.parametrize("restarted", [False, True], ids=["", "by another process"])
def test_nothing_is_left_where_storage_is_wiped(folder: Path, wipe: bool, restarted: bool) -> None:
    """Looked for on the medium itself."""
    with own_daemon() as daemon, storage_places(folder) as places, loop_device(folder / "origin", SIZE) as origin:
        with daemon.client() as client:
            path = client.attach(origin).device
            fill(path, SECRET * 256, 6 * MIB)
            snapshots = [
                client.create_snapshot([path], storage=[spec], limit=8 * MIB, wipe=wipe).id for spec, _ in places
            ]
            fill(path, os.urandom(MIB), 6 * MIB)
            assert {snapshot.state.value for snapshot in client.list_snapshots()} == {"active"}
        if restarted:
            kill_control(daemon)
        with daemon.client() as client:
            client.destroy_snapshots(snapshots)
            client.detach(path)
        os.sync()
        for spec, where in places:
            assert (SECRET[:66] in where.read_bytes()) is not wipe, spec


def kill_control(daemon: OwnDaemon) -> None:
    control = daemon.pid("control")
    os.kill(control, signal.SIGKILL)
    wait_until("another control process", lambda: daemon.replaced("control", control))
    wait_until("it answers", lambda: answers(daemon))


def answers(daemon: OwnDaemon) -> bool:
    with suppress(BlksnapError), daemon.client() as client:
        client.list_devices()
        return True
    return False


def test_who_follows_events_misses_none_when_control_is_killed(folder: Path) -> None:
    command = [sys.executable, "-m", "blksnap_ublk.cli.main", "events", "--follow", "--since", "0"]
    with own_daemon() as daemon, loop_device(folder / "origin", SIZE) as origin:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=daemon.environment) as following:
            assert following.stdout is not None
            try:
                heard = []
                for _ in range(3):
                    with daemon.client() as client:
                        device = client.attach(origin).device
                        heard.append(json.loads(following.stdout.readline()))
                        snapshot = client.create_snapshot([device], storage=[str(folder)], limit=4 * MIB)
                    kill_control(daemon)
                    with daemon.client() as client:
                        client.destroy_snapshots([snapshot.id])
                        client.detach(device)
                last = heard[-1]["seq"]
                with daemon.client() as client:
                    kept = [(event.seq, event.type) for event in client.events(since=0)]
                while last < kept[-1][0]:
                    heard.append(json.loads(following.stdout.readline()))
                    last = heard[-1]["seq"]
            finally:
                following.kill()
        assert [(event["seq"], event["type"]) for event in heard] == kept
        assert [seq for seq, _ in kept] == list(range(1, len(kept) + 1))
        assert [kind for _, kind in kept].count("taken") == 3
