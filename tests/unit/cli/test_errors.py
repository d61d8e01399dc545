# SPDX-License-Identifier: MIT
"""Every exit code, and one line on stderr with each."""

import os

import pytest

from blksnap_ublk import forms
from tests.unit.cli.conftest import Shell

SNAPSHOT = "abcd0000-0000-0000-0000-000000000000"


@pytest.fixture
def taken(shell: Shell) -> Shell:
    """A shell where /dev/sdb is attached and in a snapshot, and everything is in the way."""
    shell.good("attach /dev/sdb")
    shell.good("snapshot create sdb --storage /var/diff")
    shell.service.mounted["/dev/sdc"] = "/data"
    shell.service.open_images.add(SNAPSHOT)
    return shell


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("attach /dev/bug", 1, "attach: internal error: ZeroDivisionError: a bug; the daemon's log has more"),
        ("--socket /nowhere list", 1, "list: no daemon listens on /nowhere; start one: blksnap-ublk serve"),
        (
            "changes dump sdb /nowhere/x.npy",
            1,
            "changes dump: /nowhere/x.npy: No such file or directory (ENOENT)",
        ),
        ("attach /dev/gone", 3, "attach: /dev/gone: no such block device (ENOENT)"),
        ("detach nothing", 3, "detach: nothing: no such device"),
        ("snapshot show 0000", 3, "snapshot show: 0000: no such snapshot"),
        ("snapshot destroy abcd 0000", 3, "snapshot destroy: 0000: no such snapshot"),
        ("attach /dev/sdc", 4, "attach: /dev/sdc: in use by mount /data (EBUSY); unmount it first"),
        ("detach sdb", 4, f"detach: sdb: in snapshot {SNAPSHOT} (EBUSY); destroy it first"),
        ("snapshot destroy abcd", 4, "snapshot destroy: /dev/ublkb100: open by cat (pid 77) (EBUSY)"),
        ("attach /dev/zoned", 5, "attach: /dev/zoned: zoned devices cannot be filtered"),
        ("snapshot renew 0000", 3, "snapshot renew: 0000: no such snapshot"),
        (
            "serve --hooks /tmp",
            4,
            f"serve: runs already, as process {os.getpid()}; "
            "its hooks can be named at its start only: end it first, by `serve --stop`",
        ),
        ("storage show 0000", 3, "storage show: 0000: no such snapshot"),
        ("storage add 0000 /a", 3, "storage add: 0000: no such snapshot"),
        ("storage limit 0000 1G", 3, "storage limit: 0000: no such snapshot"),
        ("storage rate 0000 none", 3, "storage rate: 0000: no such snapshot"),
    ],
)
def test_errors(taken: Shell, line: str, code: int, says: str) -> None:
    outcome = taken(line)
    assert outcome.err == f"blksnap-ublk: {says}\n"
    assert (outcome.code, outcome.out) == (code, "")


def test_what_cannot_be_trusted(taken: Shell) -> None:
    taken.service.break_snapshot(SNAPSHOT, forms.SnapshotState.OVERFLOWN, "the storage is full")
    outcome = taken("snapshot check abcd")
    assert outcome.err == (
        f"blksnap-ublk: snapshot check: snapshot {SNAPSHOT} cannot be trusted: the storage is full; destroy it\n"
    )
    assert (outcome.code, outcome.out) == (6, "")
    assert taken("snapshot check abcd --json").json["reason"] == "the storage is full"
    outcome = taken("changes show sdb --since none --until abcd --json")
    assert (outcome.code, outcome.out) == (6, "")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "missing command"),
        ("snap", "no such command 'snap'"),
        ("snapshot", "snapshot: missing command"),
        ("snapshot make", "snapshot: no such command 'make'"),
        ("attach", "attach: missing argument"),
        ("attach /dev/sdb --frobnicate", "attach: no such option: --frobnicate"),
        ("attach /dev/sdb /dev/sdc", "attach: got unexpected extra argument"),
        ("attach /dev/sdb --queues many", "attach: invalid value for '--queues'"),
        ("attach /dev/sdb --queues 0", "attach: invalid value for '--queues'"),
        ("attach /dev/sdb --unit 4X", "attach: invalid value for '--unit': '4X' is not a size"),
        ("snapshot create sdb", "snapshot create: no difference storage; give --storage SPEC"),
        ("snapshot create sdb --storage /a --limit big", "snapshot create: invalid value for '--limit'"),
        (
            "snapshot create sdb --storage /a --ttl soon",
            "snapshot create: invalid value for '--ttl': 'soon' is not a time",
        ),
        ("snapshot create sdb --storage /a --while-pid me", "snapshot create: invalid value for '--while-pid'"),
        (
            "snapshot create sdb --storage /a --while-pid 4000000",
            "snapshot create: --while-pid 4000000: no such process",
        ),
        ("snapshot renew abcd", f"snapshot renew: snapshot {SNAPSHOT}: has no time to live; give --ttl TIME"),
        ("snapshot renew abcd --ttl 0", "snapshot renew: invalid value for '--ttl': '0' is no time at all"),
        ("snapshot create sdb --storage /a --print everything", "snapshot create: invalid value for '--print'"),
        ("snapshot create sdb --storage /a --on-overflow panic", "snapshot create: --on-overflow panic: not one of"),
        (
            "snapshot create sdb --storage /a --on-overflow pause:0",
            "snapshot create: --on-overflow pause:0: no time that writers can wait; give from 1 to 86400 seconds",
        ),
        ("snapshot create sdb --storage /a --on-overflow pause", "snapshot create: --on-overflow pause: not one of"),
        ("snapshot create sdb --storage /a --copy-rate all", "snapshot create: invalid value for '--copy-rate'"),
        ("storage add abcd", "storage add: no difference storage is named; give SPECs or --storage-file PATH"),
        ("storage limit abcd", "storage limit: missing argument"),
        ("storage limit abcd much", "storage limit: invalid value for 'SIZE'"),
        ("storage rate abcd fast", "storage rate: invalid value: 'fast' is not a size"),
        ("storage rate abcd 4K", "storage rate: --copy-rate: 4096 bytes a second is no rate for copies"),
        ("snapshot create sdb --storage /a --no-freeze --require-freeze", "snapshot create: --no-freeze and"),
        ("snapshot show abc", "snapshot show: abc: give at least 4 characters"),
        ("changes show sdb", "changes show: missing option '--since'"),
        ("changes show sdb --since 3", "changes show: --since 3: a bare number would be silently wrong"),
        ("changes show sdb --since x:3", "changes show: --since x:3: not a cursor"),
        ("changes mark sdb", "changes mark: give either --range"),
        ("changes mark sdb --range 0+1 --file /a", "changes mark: give either --range"),
        ("changes mark sdb --range 4096", "changes mark: invalid value: '4096' is not a range"),
        ("changes mark sdb --range 2T+1", "changes mark: sdb: a range lies outside of the device"),
        ("events --since -1", "events: invalid value for '--since'"),
        ("serve --foreground --stop", "serve: --foreground and --stop exclude one another"),
        ("serve --takeover --stop", "serve: --takeover and --stop exclude one another"),
        ("serve --json", "serve: --json needs --takeover"),
        ("serve --hooks /tmp --stop", "serve: --hooks and --stop exclude one another"),
        ("serve --hooks /nowhere", "serve: --hooks /nowhere: not a directory"),
    ],
)
def test_wrong_usage(taken: Shell, line: str, says: str) -> None:
    outcome = taken(line)
    assert outcome.err.startswith(f"blksnap-ublk: {says}")
    assert outcome.err.count("\n") == 1
    assert (outcome.code, outcome.out) == (2, "")
    assert len(taken.service.devices) == 1
    assert len(taken.service.snapshots) == 1


def test_a_traceback_only_when_asked_for(taken: Shell) -> None:
    for line in ("--debug attach /dev/gone", "attach /dev/gone --debug"):
        outcome = taken(line)
        assert "Traceback" in outcome.err
        assert outcome.err.endswith("blksnap-ublk: attach: /dev/gone: no such block device (ENOENT)\n")
        assert (outcome.code, outcome.out) == (3, "")


def test_after_two_dashes_nothing_is_an_option(taken: Shell) -> None:
    outcome = taken("attach -- --debug")
    assert outcome.code == 0
    assert [device.name for device in taken.service.devices.values()] == ["sdb", "--debug"]
