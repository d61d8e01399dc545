# SPDX-License-Identifier: MIT
"""Freezing by a helper process: whatever happens, no file system stays frozen."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blksnap_ublk.host import mounts
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.freeze import Freezer, mounted_on
from tests.loop_devices import loop_device, missing_for_loops, mounted

pytestmark = pytest.mark.skipif(missing_for_loops() is not None, reason=str(missing_for_loops()))
SHORT = 1.0


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    with loop_device(tmp_path / "image", 16 << 20) as device, mounted(device, tmp_path / "mounted") as directory:
        yield directory
        # A helper that was given up ends by itself, and has the file system open until then.
        end = time.monotonic() + 60
        while helpers_of(directory) and time.monotonic() < end:
            time.sleep(0.05)


def mounts_at(directory: Path) -> list[mounts.Mount]:
    return mounted_on([DeviceNumber.of(directory.stat().st_dev)])


def helpers_of(directory: Path) -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if bytes(directory) in path.read_bytes():
                found.append(path)
    return found


def writes(directory: Path) -> threading.Thread:
    """A thread that writes to the file system: it lives on while that is frozen."""
    thread = threading.Thread(target=(directory / "file").write_text, args=("x",), daemon=True)
    thread.start()
    return thread


def test_the_mounts_of_a_device_are_found(directory: Path) -> None:
    assert [mount.point for mount in mounts_at(directory)] == [str(directory)]


def test_writes_wait_between_freeze_and_thaw(directory: Path) -> None:
    with Freezer(mounts_at(directory)) as freezer:
        assert freezer.freeze()
        writer = writes(directory)
        writer.join(SHORT)
        assert writer.is_alive()
        assert freezer.thaw()
        writer.join(30)
        assert not writer.is_alive()
    assert freezer.warnings == []


def test_an_error_in_between_thaws(directory: Path) -> None:
    with suppress(KeyError), Freezer(mounts_at(directory)) as freezer:
        assert freezer.freeze()
        raise KeyError
    (directory / "file").write_text("x")


def test_the_death_of_the_process_that_froze_thaws(directory: Path) -> None:
    script = (
        "import os, sys\n"
        "from blksnap_ublk.host.number import DeviceNumber\n"
        "from blksnap_ublk.snapshot.freeze import Freezer, mounted_on\n"
        "with Freezer(mounted_on([DeviceNumber.of(os.stat(sys.argv[1]).st_dev)])) as freezer:\n"
        "    print(freezer.freeze(), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        process.send_signal(signal.SIGKILL)
    writer = writes(directory)
    writer.join(30)
    assert not writer.is_alive()
    while helpers_of(directory):
        time.sleep(0.01)


@pytest.mark.parametrize("told", [False, True])
def test_the_death_of_the_helper_thaws(directory: Path, told: bool) -> None:
    with Freezer(mounts_at(directory)) as freezer:
        assert freezer.freeze()
        (helper,) = helpers_of(directory)
        os.kill(int(helper.parent.name), signal.SIGKILL)
        if told:
            assert not freezer.thaw()
            assert "has died" in freezer.warnings[0]
    writer = writes(directory)
    writer.join(30)
    assert not writer.is_alive()
    while helpers_of(directory):
        time.sleep(0.01)


def test_what_is_given_up_is_not_waited_for(directory: Path) -> None:
    over = threading.Event()
    with Freezer(mounts_at(directory), over.is_set) as freezer:
        assert freezer.freeze()
        (helper,) = helpers_of(directory)
        os.kill(int(helper.parent.name), signal.SIGSTOP)
        over.set()
        assert not freezer.thaw()
        assert "the io process died" in freezer.warnings[0]
    os.kill(int(helper.parent.name), signal.SIGCONT)
    writer = writes(directory)
    writer.join(30)
    assert not writer.is_alive()
    while helpers_of(directory):
        time.sleep(0.01)


def test_it_thaws_by_itself_and_says_so(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blksnap_ublk.snapshot.freeze.FREEZE_LIMIT", 0.2)
    with Freezer(mounts_at(directory)) as freezer:
        assert freezer.freeze()
        writer = writes(directory)
        writer.join(30)
        assert not writer.is_alive()
        assert not freezer.thaw()


def test_what_another_froze_is_left_alone(directory: Path) -> None:
    with Freezer(mounts_at(directory)) as other:
        assert other.freeze()
        with Freezer(mounts_at(directory)) as freezer:
            assert freezer.freeze()
            assert "already frozen" in freezer.warnings[0]
            assert freezer.thaw()
        writer = writes(directory)
        writer.join(SHORT)
        assert writer.is_alive()
    writer.join(30)
    assert not writer.is_alive()


def test_what_cannot_be_frozen_is_named() -> None:
    proc = next(mount for mount in mounts.own_mounts() if mount.point == "/proc")
    with Freezer([proc]) as freezer:
        assert not freezer.freeze()
        assert freezer.thaw()
    assert freezer.warnings[0].startswith("/proc: proc was not frozen")


def test_without_mounts_no_process_is_started() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Freezer([]) as freezer:
        assert freezer.freeze()
        assert len(set(os.listdir("/proc/self/fd")) - before) <= 1
        assert freezer.thaw()
