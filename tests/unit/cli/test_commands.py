# SPDX-License-Identifier: MIT
"""What each command prints: for people, and as JSON in the forms of the contract."""

import os
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from blksnap_ublk import forms
from tests.unit.cli.conftest import Shell
from tests.unit.fake_service import LOST

SNAPSHOT = "abcd0000-0000-0000-0000-000000000000"
GENERATION = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def taken(shell: Shell) -> Shell:
    """A shell where /dev/sdb is attached and in a snapshot."""
    shell.good("attach /dev/sdb")
    shell.good("snapshot create sdb --storage /var/diff:0+2048 --limit 1G")
    return shell


def test_attach_prints_the_path(shell: Shell) -> None:
    assert shell.good("attach /dev/sdb").out == "/dev/ublkb0\n"


def test_attach_with_options(shell: Shell) -> None:
    outcome = shell.good("attach /dev/sdb --name data --queues 4 --depth 32 --tracking-block 1M --unit 8K --json")
    device = msgspec.convert(outcome.json, forms.Device)
    assert (device.name, device.queues, device.depth, device.tracking_block, device.unit) == (
        "data",
        4,
        32,
        1 << 20,
        8192,
    )


def test_attach_with_a_vouch(shell: Shell) -> None:
    shell.good("attach /dev/sdb")
    shell.good("attach /dev/sdc --trust-offline")
    assert shell.service.trusted == [False, True]


def test_resize(shell: Shell) -> None:
    """What has changed is said to people only; the same size is no failure."""
    size = msgspec.convert(shell.good("attach /dev/sdb --json").json, forms.Device).size
    outcome = shell("resize sdb")
    assert (outcome.code, outcome.out) == (0, "")
    assert f"has {2 * size} bytes now, {size} before" in outcome.err
    outcome = shell("resize /dev/ublkb0 --json")
    assert outcome.code == 0
    assert msgspec.convert(outcome.json, forms.Resized).former_size == 2 * size
    assert "already" in outcome.err
    assert shell("resize /dev/nothing").code == 3


def test_list(shell: Shell) -> None:
    assert shell.good("list --json").json == {"devices": []}
    shell.good("attach /dev/sdb")
    assert [entry["name"] for entry in shell.good("list --json").json["devices"]] == ["sdb"]
    header, row = shell.good("list").out.splitlines()
    assert header.split() == ["DEVICE", "NAME", "ORIGIN", "SIZE", "STATE", "DATA", "CHANGE", "SNAPSHOTS"]
    assert row.split() == ["/dev/ublkb0", "sdb", "/dev/sdb", "1G", "live", "zero-copy", "0", "0"]


def test_detach_prints_nothing(shell: Shell) -> None:
    shell.good("attach /dev/sdb")
    assert shell.good("detach /dev/ublkb0").out == ""


def test_detach_by_force_says_what_it_broke(taken: Shell) -> None:
    outcome = taken("detach sdb --force")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"blksnap-ublk: detach: warning: snapshot {SNAPSHOT} is broken\n"


def test_detach_json(taken: Shell) -> None:
    detached = msgspec.convert(taken("detach sdb --force --json").json, forms.Detached)
    assert detached.broken_snapshots == [SNAPSHOT]


def test_create_prints_the_uuid_or_the_images(shell: Shell) -> None:
    shell.good("attach /dev/sdb")
    shell.good("attach /dev/sdc")
    assert shell.good("snapshot create sdb sdc --storage /a").out == f"{SNAPSHOT}\n"
    assert shell.good("snapshot create sdb sdc --storage /b --print images").out == "/dev/ublkb100\n/dev/ublkb101\n"
    created = shell.good("snapshot create sdb --storage /c --storage-file /d:0+1 --storage-file /e --json").json
    assert [
        area["path"] for area in msgspec.to_builtins(msgspec.convert(created, forms.Snapshot))["storage"]["areas"]
    ] == [
        "/c",
        "/d:0+1",
        "/e",
    ]


@pytest.mark.parametrize(
    ("options", "freeze"),
    [("", forms.Freeze.TRY), ("--no-freeze", forms.Freeze.NO), ("--require-freeze", forms.Freeze.REQUIRE)],
)
def test_create_passes_its_options_on(shell: Shell, options: str, freeze: forms.Freeze) -> None:
    shell.good("attach /dev/sdb")
    shell.good(f"snapshot create sdb --storage /a --storage /b --limit 2T --on-overflow break {options}")
    assert shell.service.requests == [
        ("create_snapshot", (["/a", "/b"], [], 2 << 40, "break", freeze)),
        ("lifetime", (False, None, None)),
    ]


def test_warnings_do_not_get_into_the_result(shell: Shell) -> None:
    shell.good("attach /dev/sdb")
    shell.service.warnings.append("/data could not be frozen")
    outcome = shell("snapshot create sdb --storage /a")
    assert (outcome.code, outcome.out) == (0, f"{SNAPSHOT}\n")
    assert outcome.err == "blksnap-ublk: snapshot create: warning: /data could not be frozen\n"


def test_snapshot_list_and_show(taken: Shell) -> None:
    (listed,) = taken.good("snapshot list --json").json["snapshots"]
    assert listed == taken.good("snapshot show abcd --json").json
    assert msgspec.convert(listed, forms.Snapshot).id == SNAPSHOT
    assert SNAPSHOT in taken.good("snapshot list").out
    shown = taken.good("snapshot show abcd").out
    for part in (SNAPSHOT, "412 µs", "4K of 1M (0 %)", "/dev/ublkb100", f"{GENERATION}:1", "/var/diff:0+2048", "1G"):
        assert part in shown


def test_a_snapshot_that_ends_by_itself(shell: Shell) -> None:
    shell.good("attach /dev/sdb")
    pid = os.getpid()
    created = shell.good(f"snapshot create sdb --storage @abcd --partitions --ttl 2h --while-pid {pid} --json").json
    assert shell.service.requests[0][1] == (["@abcd"], [], None, None, forms.Freeze.TRY)
    assert shell.service.requests[1] == ("lifetime", (True, 7200.0, pid))
    assert (created["expires"], created["ttl"]) == ("2026-01-31T14:00:00.000000Z", 7200)
    assert (created["while_pid"], created["partitions"]) == (pid, True)
    shown = shell.good("snapshot show abcd").out
    assert f"2026-01-31T14:00:00.000000Z or with {pid}" in shown
    assert f"/dev/blksnap/{SNAPSHOT}/sdb" in shown
    assert f" with {pid} " in shell.good("snapshot list").out
    assert shell.good("snapshot renew abcd").out == ""
    renewed = shell.good("snapshot renew abcd --ttl 10m --json").json
    assert (renewed["id"], renewed["ttl"], renewed["expires"]) == (SNAPSHOT, 600, "2026-01-31T12:11:40.000000Z")


def test_storage_is_shown_and_changed(taken: Shell) -> None:
    shown = taken.good("storage show abcd --json").json
    assert shown == taken.good("snapshot show abcd --json").json["storage"]
    assert msgspec.convert(shown, forms.Storage).snapshots == [SNAPSHOT]
    added = taken.good("storage add abcd /more /dev/sdd:0+8 --storage-file /odd:1+1 --json").json
    assert [area["path"] for area in added["areas"]] == ["/var/diff:0+2048", "/more", "/dev/sdd:0+8", "/odd:1+1"]
    assert taken.good("storage limit abcd 20G --json").json["limit"] == 20 << 30
    assert taken.good("storage rate abcd 50M --json").json["copy_rate"] == 50 << 20
    assert "50M a second" in taken.good("storage show abcd").out
    assert taken.good("storage rate abcd none --json").json["copy_rate"] is None
    for line in ("storage show abcd", "storage add abcd /more", "storage limit abcd 2G", "storage rate abcd 2M"):
        people = taken.good(line).out
        assert "/more" in people
        assert SNAPSHOT in people


def test_what_is_said_of_storage_when_it_is_named(shell: Shell) -> None:
    shell.good("attach /dev/sdb")
    line = "snapshot create sdb --storage /a --limit 1G --on-overflow pause:30 --wipe --copy-rate 8M --json"
    storage = shell.good(line).json["storage"]
    assert (storage["on_overflow"], storage["wipe"], storage["copy_rate"]) == ("pause:30", True, 8 << 20)
    assert (storage["waiting"], storage["growing"]) == (0, True)
    shell.service.change_storage("abcd", waiting=3)
    shown = shell.good("snapshot show abcd").out
    for part in ("3 requests wait for room", "pause:30", "by itself", "when given back", "8M a second"):
        assert part in shown
    assert shell.good("snapshot show abcd --json").json["storage"]["waiting"] == 3


def test_show_tells_of_a_broken_snapshot(taken: Shell) -> None:
    taken.service.break_snapshot(SNAPSHOT, forms.SnapshotState.OVERFLOWN, "the storage is full")
    assert "overflown: the storage is full" in taken.good("snapshot show abcd").out
    assert f"lost at      {LOST}" in taken.good("snapshot show abcd").out
    assert f"overflown since {LOST}" in taken.good("snapshot list").out
    shown = taken.good("snapshot show abcd --json").json
    assert (shown["state"], shown["error"], shown["lost_at"]) == ("overflown", "the storage is full", LOST)


def test_check(taken: Shell) -> None:
    assert taken.good("snapshot check abcd").out == ""
    assert taken.good("snapshot check abcd --json").json == {"id": SNAPSHOT, "trusted": True, "reason": None}


def test_destroy(taken: Shell) -> None:
    taken.good("snapshot create sdb --storage /b")
    assert taken.good("snapshot destroy abcd0000-0000-0000-0000-000000000001").out == ""
    assert taken.good("snapshot destroy abcd --json").json["destroyed"] == [SNAPSHOT]
    assert taken.good("snapshot list --json").json == {"snapshots": []}


def test_changes_show(taken: Shell) -> None:
    assert taken.good("changes show sdb --since none").out == "  START  LENGTH\n      0   65536\n1048576  131072\n"
    outcome = taken.good(f"changes show sdb --since {GENERATION}:0 --until abcd --json")
    assert msgspec.convert(outcome.json, forms.Changes).since == f"{GENERATION}:0"
    assert outcome.json["ranges"] == [{"start": 0, "length": 65536}, {"start": 1048576, "length": 131072}]
    assert taken.good("changes show sdb --since none --json").json["since"] is None


def test_many_changes_are_one_document(taken: Shell) -> None:
    count = 40_000
    taken.service.ranges = np.stack([np.arange(count) * 8192, np.full(count, 4096)], axis=1).astype(np.int64)
    shown = taken.good("changes show sdb --since none --json").json
    assert [entry["start"] for entry in shown["ranges"]] == list(range(0, count * 8192, 8192))


def test_a_foreign_cursor_is_all_with_the_reason(taken: Shell) -> None:
    outcome = taken("changes show sdb --since 11111111-2222-3333-4444-555555555555:3 --json")
    assert (outcome.code, outcome.json["all"], outcome.json["reason"]) == (0, True, "new-generation")
    people = taken("changes show sdb --since 11111111-2222-3333-4444-555555555555:3")
    assert people.code == 0
    assert people.err == "blksnap-ublk: changes show: warning: everything counts as changed: new-generation\n"


def test_changes_info(taken: Shell) -> None:
    info = msgspec.convert(taken.good("changes info sdb --json").json, forms.ChangesInfo)
    assert (info.generation, info.change_number, info.tracking_block, info.changed_blocks) == (GENERATION, 1, 65536, 3)
    assert "tracking block  64K" in taken.good("changes info sdb").out


def test_changes_mark(taken: Shell) -> None:
    assert taken.good("changes mark sdb --range 0+4096 --range 1M+64K").out == ""
    assert [(r.start, r.length) for r in taken.service.marked] == [(0, 4096), (1 << 20, 65536)]
    assert taken.good("changes mark sdb --range 0+1 --json").json == {"device": "/dev/ublkb0", "marked_bytes": 1}


def test_changes_dump(taken: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mask = os.umask(0o027)
    try:
        assert taken.good("changes dump sdb last.npy").out == ""
    finally:
        os.umask(mask)
    assert np.array_equal(np.load(tmp_path / "last.npy"), taken.service.last)
    assert (tmp_path / "last.npy").stat().st_mode & 0o777 == 0o640


def test_events(taken: Shell) -> None:
    for line in ("events", "events --json"):
        lines = taken.good(line).out.splitlines()
        assert [msgspec.json.decode(text, type=forms.Event).type for text in lines] == ["attached", "taken"]
    assert taken.good("events --since 2").out == ""
    assert taken.good("events --snapshot abcd0000-0000-0000-0000-000000000000").out.count("\n") == 1


def test_status(taken: Shell) -> None:
    status = msgspec.convert(taken.good("status --json").json, forms.Status)
    assert status.devices[0].rates is not None
    shown = taken.good("status").out
    assert "/dev/ublkb0" in shown
    assert re.search(r"active +4K of 1M \(0 %\) +to 1G +90 s +0\n", shown)


def test_doctor(shell: Shell) -> None:
    assert shell.good("doctor").out == (
        "ok    kernel  6.12\nfail  ublk    no /dev/ublk-control\n              -> modprobe ublk_drv\n"
    )
    findings = msgspec.convert(shell.good("doctor --json").json, forms.Findings).findings
    assert [finding.advice for finding in findings] == [None, "modprobe ublk_drv"]


def test_doctor_that_puts_right(shell: Shell) -> None:
    outcome = shell("doctor --fix")
    assert (outcome.code, outcome.out) == (0, shell.good("doctor").out)
    assert outcome.err == "blksnap-ublk: doctor: udev: wrote /etc/rules\n"
    repaired = msgspec.convert(shell.good("doctor --fix --json").json, forms.Repaired)
    assert repaired.fixed == ["udev: wrote /etc/rules"]
    assert [finding.name for finding in repaired.findings] == ["kernel", "ublk"]


def test_version(shell: Shell) -> None:
    version = msgspec.convert(shell.good("version --json").json, forms.Version)
    assert version.daemon == "9.9"
    assert shell.good("version").out == f"blksnap-ublk {version.version}\ndaemon 9.9\n"
    assert shell.good("--socket /nowhere version --json").json["daemon"] is None


def test_serve_where_it_runs(shell: Shell) -> None:
    outcome = shell("serve")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"blksnap-ublk: serve: runs already, as process {os.getpid()}\n"


def test_devices_without_rates(shell: Shell) -> None:
    status = forms.DeviceStatus(
        device=msgspec.convert(shell.good("attach /dev/sdb --json").json, forms.Device),
        traffic=forms.Traffic(reads=0, writes=0, read_bytes=0, written_bytes=0, preserved_bytes=0),
        rates=None,
    )
    assert msgspec.json.decode(forms.to_json(status))["rates"] is None
