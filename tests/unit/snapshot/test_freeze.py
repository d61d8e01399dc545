# SPDX-License-Identifier: MIT
"""Freezing by helper processes: whatever happens, no file system stays frozen, and none is thawed for somebody else."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blksnap_ublk.errors import Failed
from blksnap_ublk.host import mounts, superblock
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.freeze import Freezer, mounted_on
from blksnap_ublk.snapshot.freeze_order import FileSystem
from tests.freezing import (
    FREEZER,
    WATCHDOG,
    assert_ends,
    assert_frozen,
    assert_thawed,
    helpers,
    kill,
    wait_until_gone,
)
from tests.loop_devices import loop_device, missing_for_loops, mounted, run

pytestmark = pytest.mark.skipif(missing_for_loops() is not None, reason=str(missing_for_loops()))
HOLDER = """
import json, os, sys
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.freeze import Freezer, mounted_on
with Freezer(mounted_on([DeviceNumber.of(os.stat(sys.argv[1]).st_dev)])) as freezer:
    print("started", flush=True)
    print(json.dumps(freezer.freeze()), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    with loop_device(tmp_path / "image", 16 << 20) as device, mounted(device, tmp_path / "mounted") as directory:
        yield directory
        # Helpers that were given up end by themselves, and have the file system open until then.
        wait_until_gone(directory)


def systems_at(directory: Path) -> list[FileSystem]:
    return mounted_on([DeviceNumber.of(directory.stat().st_dev)])


def the_freezer(directory: Path) -> int:
    (pid,) = helpers(directory, FREEZER)
    return pid


def the_watchdog(directory: Path) -> int:
    (pid,) = helpers(directory, WATCHDOG)
    return pid


def test_the_mounts_of_a_device_are_found(directory: Path) -> None:
    assert [system.point for system in systems_at(directory)] == [str(directory)]


def test_writes_wait_between_freeze_and_thaw(directory: Path) -> None:
    with Freezer(systems_at(directory)) as freezer:
        assert freezer.freeze()
        writer = assert_frozen(directory)
        assert freezer.thaw()
        assert_ends(writer, directory)
    assert freezer.warnings == []
    assert not helpers(directory, FREEZER, WATCHDOG)


def test_an_error_in_between_thaws(directory: Path) -> None:
    with suppress(KeyError), Freezer(systems_at(directory)) as freezer:
        assert freezer.freeze()
        raise KeyError
    assert_thawed(directory)


def test_the_helpers_are_in_a_session_of_their_own_and_outlive_signals(directory: Path) -> None:
    with Freezer(systems_at(directory)) as freezer:
        assert freezer.freeze()
        for pid in (the_freezer(directory), the_watchdog(directory)):
            assert os.getsid(pid) != os.getsid(0)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
        writer = assert_frozen(directory)
        assert freezer.thaw()
        assert_ends(writer, directory)


@pytest.mark.parametrize("told", [False, True])
def test_the_death_of_the_freezer_thaws(directory: Path, told: bool) -> None:
    with Freezer(systems_at(directory)) as freezer:
        assert freezer.freeze()
        kill(the_freezer(directory))
        assert_thawed(directory)
        if told:
            assert not freezer.thaw()
            assert "has died" in freezer.warnings[0]


def test_the_death_of_the_watchdog_changes_nothing(directory: Path) -> None:
    with Freezer(systems_at(directory)) as freezer:
        assert freezer.freeze()
        kill(the_watchdog(directory))
        writer = assert_frozen(directory)
        assert freezer.thaw()
        assert_ends(writer, directory)
    assert freezer.warnings == []


def test_without_a_watchdog_nothing_is_frozen(directory: Path) -> None:
    with Freezer(systems_at(directory)) as freezer:
        kill(the_watchdog(directory))
        while helpers(directory, WATCHDOG):
            time.sleep(0.01)
        with pytest.raises(Failed, match="has died"):
            freezer.freeze()
        assert_thawed(directory)


def test_the_death_of_both_helpers_thaws(directory: Path) -> None:
    with Freezer(systems_at(directory)) as freezer:
        assert freezer.freeze()
        kill(the_watchdog(directory), the_freezer(directory))
        assert not freezer.thaw()
    assert_thawed(directory)


@pytest.mark.parametrize("others", [[], [FREEZER], [WATCHDOG]])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_death_of_the_process_that_froze_thaws(directory: Path, others: list[str], frozen: bool) -> None:
    """Alone and together with one of the helpers, when all is frozen and at a moment drawn before that."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(1 if frozen else 6):
        command = [sys.executable, "-c", HOLDER, str(directory)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            if frozen:
                assert json.loads(process.stdout.readline())
            else:
                time.sleep(chance.random() * 0.03)
            pids = [pid for name in others for pid in helpers(directory, name)]
            kill(process.pid, *pids)
        assert_thawed(directory)
        wait_until_gone(directory)


def test_what_is_given_up_is_not_waited_for(directory: Path) -> None:
    over = threading.Event()
    with Freezer(systems_at(directory), over.is_set) as freezer:
        assert freezer.freeze()
        stopped = the_freezer(directory)
        os.kill(stopped, signal.SIGSTOP)
        over.set()
        assert not freezer.thaw()
        assert "the io process died" in freezer.warnings[0]
    assert_thawed(directory)  # by the watchdog


@pytest.mark.parametrize("stopped", [False, True])
def test_the_limit_thaws_and_it_is_said(directory: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    monkeypatch.setattr("blksnap_ublk.snapshot.freeze.FREEZE_LIMIT", 0.2)
    with Freezer(systems_at(directory)) as freezer:
        assert freezer.freeze()
        if stopped:
            os.kill(the_freezer(directory), signal.SIGSTOP)
        assert_thawed(directory)
        assert not freezer.thaw()
        if stopped:
            assert "by the watchdog after 0.2 s" in freezer.warnings[0]


def test_what_another_froze_is_left_alone(directory: Path) -> None:
    with Freezer(systems_at(directory)) as other:
        assert other.freeze()
        with Freezer(systems_at(directory)) as freezer:
            assert freezer.freeze()
            assert "already frozen" in freezer.warnings[0]
            assert freezer.thaw()
        writer = assert_frozen(directory)
    assert_ends(writer, directory)


def test_the_watchdog_leaves_alone_what_another_froze(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        assert superblock.freeze(descriptor) == 0
        with Freezer(systems_at(directory)) as freezer:
            assert freezer.freeze()
            kill(the_freezer(directory))
        wait_until_gone(directory)
        writer = assert_frozen(directory)
    finally:
        assert superblock.thaw(descriptor) == 0
        os.close(descriptor)
    assert_ends(writer, directory)


def test_what_another_thawed_was_not_frozen(directory: Path) -> None:
    with Freezer(systems_at(directory)) as freezer:
        assert freezer.freeze()
        run("fsfreeze", "-u", str(directory))
        assert not freezer.thaw()


def test_what_cannot_be_frozen_is_named() -> None:
    proc = next(mount for mount in mounts.own_mounts() if mount.point == "/proc")
    with Freezer([FileSystem((proc,), frozenset())]) as freezer:
        assert not freezer.freeze()
        assert freezer.thaw()
    assert freezer.warnings[0].startswith("/proc: proc was not frozen")


def test_a_file_system_that_is_in_use_out_of_sight_is_named(tmp_path: Path) -> None:
    if not Path("/sys/fs/ext4").exists():
        pytest.skip("this kernel does not tell which ext4 it has")
    with loop_device(tmp_path / "image", 16 << 20) as device, mounted(device, tmp_path / "mounted") as directory:
        number = DeviceNumber.of(directory.stat().st_dev)
        with (directory / "file").open("w"):
            run("umount", "--lazy", str(directory))
            with Freezer(mounted_on([number])) as freezer:
                assert not freezer.freeze()
                assert freezer.thaw()
            assert freezer.warnings == [
                f"device {number}: its file system was not frozen: no mount of it can be reached"
            ]
        run("mount", device, str(directory))


def test_a_mount_that_another_hides_is_reached_by_a_second_one(directory: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    run("mount", "-t", "tmpfs", "none", str(directory))
    try:
        hidden = mounted_on([next(m.device for m in mounts.own_mounts() if m.point == str(directory))])
        with Freezer(hidden) as freezer:
            assert not freezer.freeze()
            assert "hidden" in freezer.warnings[0]
    finally:
        run("umount", str(directory))
    run("mount", "--bind", str(directory), str(again))
    try:
        run("mount", "-t", "tmpfs", "none", str(directory))
        (system,) = systems_at(again)
        assert {mount.point for mount in system.mounts} == {str(directory), str(again)}
        with Freezer([system]) as freezer:
            assert freezer.freeze()
            writer = assert_frozen(again)
        assert_ends(writer, again)
    finally:
        run("umount", str(directory))
        run("umount", str(again))


def test_without_file_systems_no_process_is_started() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Freezer([]) as freezer:
        assert freezer.freeze()
        assert len(set(os.listdir("/proc/self/fd")) - before) <= 1
        assert freezer.thaw()


def test_nothing_stays_open(directory: Path) -> None:
    systems = systems_at(directory)
    before = set(os.listdir("/proc/self/fd"))
    with Freezer(systems) as freezer:
        assert freezer.freeze()
    assert set(os.listdir("/proc/self/fd")) == before
