# SPDX-License-Identifier: MIT
"""The program as a process: signals, pipes, start-up, and a daemon that it starts."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Shell

ROOT = Path(__file__).parents[3]
PROGRAM = [sys.executable, "-m", "blksnap_ublk.cli.main"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")


@pytest.fixture
def following(shell: Shell) -> Iterator["subprocess.Popen[str]"]:
    """`events --follow`, which has printed its first line."""
    process = subprocess.Popen(
        [*PROGRAM, "events", "--follow", "--since", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    shell.in_loop(lambda: shell.service.tell("taken"))
    assert process.stdout is not None
    assert '"seq":1,' in process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_followed_events_come_line_by_line(shell: Shell, following: "subprocess.Popen[str]") -> None:
    assert following.stdout is not None
    for number in range(2, 5):
        shell.in_loop(lambda: shell.service.tell("storage-grown"))
        assert f'"seq":{number},' in following.stdout.readline()


def test_ctrl_c_is_clean(following: "subprocess.Popen[str]") -> None:
    following.send_signal(signal.SIGINT)
    assert following.communicate(timeout=60) == ("", "")
    assert following.returncode == 130


def test_a_reader_that_goes_is_no_error(shell: Shell, following: "subprocess.Popen[str]") -> None:
    assert following.stdout is not None
    following.stdout.close()
    shell.in_loop(lambda: shell.service.tell("taken"))
    assert following.stderr is not None
    assert following.stderr.read() == ""
    assert following.wait(60) == 141


def test_a_daemon_that_ends_is_one_line(tmp_path: Path) -> None:
    """The daemon goes away in the middle of a stream."""
    environment = os.environ | {"BLKSNAP_UBLK_RUN": str(tmp_path), "SMALL_DAEMON": "serve"}
    daemon = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.client.small_daemon", "--ready-fd", "1"],
        env=environment,
        stdout=subprocess.PIPE,
    )
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == b"ready\n"
    process = subprocess.Popen(
        [*PROGRAM, "status", "--follow", "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    daemon.kill()
    daemon.communicate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("blksnap-ublk: status: no answer from the daemon: ")
    assert err.count("\n") == 1


def test_the_program_is_light() -> None:
    code = "import sys, blksnap_ublk.cli.main; print([m for m in ('numpy', 'asyncio', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_completion(shell: Shell) -> None:
    environment = os.environ | {
        "_BLKSNAP_UBLK_COMPLETE": "complete_bash",
        "COMP_WORDS": "blksnap-ublk sna",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["snapshot"]


def test_whoever_is_not_root_is_told_so(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    (tmp_path / "run").mkdir(mode=0o700)
    code = """
import os, sys
from blksnap_ublk.cli.main import run
run(["version"])  # Imports what the other user may not be able to read.
os.setresuid(65534, 65534, 65534)
sys.exit(run(["list"]))
"""
    environment = os.environ | {"BLKSNAP_UBLK_RUN": str(tmp_path / "run")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "blksnap-ublk: list: needs root (EACCES); use sudo\n"
