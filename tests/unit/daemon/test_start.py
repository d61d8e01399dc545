# SPDX-License-Identifier: MIT
"""Starts of the daemon that fail: one line, an exit code, and the same line for who asked for the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "blksnap_ublk.daemon.main"]


def start(runtime: Path, *arguments: str, user: int | None = None) -> tuple[int, str, str]:
    """Exit status, stderr, and what came through the ready descriptor."""
    hear, say = os.pipe()
    done = subprocess.run(
        [*COMMAND, "--ready-fd", str(say), *arguments],
        env=os.environ | {"BLKSNAP_UBLK_RUN": str(runtime)},
        pass_fds=[say],
        capture_output=True,
        text=True,
        timeout=60,
        user=user,
    )
    os.close(say)
    with open(hear) as pipe:
        return done.returncode, done.stderr, pipe.read()


@pytest.mark.skipif(Path("/dev/ublk-control").exists(), reason="this system has ublk: the daemon would start")
@pytest.mark.skipif(os.geteuid() != 0, reason="not root: it is the right that is missing first")
@pytest.mark.parametrize("arguments", [(), ("--foreground",)])
def test_without_ublk_it_says_what_to_do(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    status, stderr, told = start(tmp_path / "run", *arguments)
    assert status == 5
    assert "no ublk" in told
    assert "ublk_drv" in told
    assert told.count("\n") == 1
    assert stderr == f"blksnap-ublkd: {told}"
    assert not (tmp_path / "run").exists()


def can_run_as_nobody() -> bool:
    """Whether another user can run this Python at all: it may lie in a closed directory."""
    try:
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, user=65534, timeout=60)
    except PermissionError:
        return False
    return done.returncode == 0


def test_without_root_it_says_so(tmp_path: Path) -> None:
    user = None
    if os.geteuid() == 0:
        if not can_run_as_nobody():
            pytest.skip("another user cannot run this Python: it lies in a closed directory")
        user = 65534
    status, stderr, told = start(tmp_path / "run", user=user)
    assert status == 1
    assert told == "the daemon needs root; run it with sudo\n"
    assert stderr == f"blksnap-ublkd: {told}"


def test_hooks_that_are_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "missing"):
        status, stderr, _ = start(tmp_path / "run", f"--hooks={tmp_path / name}")
        assert status == 2
        assert stderr.endswith(f"'{tmp_path / name}' is not a directory\n")


@pytest.mark.parametrize("size", ["", "0", "12Q", "-1", "1.5G", "x"])
def test_a_wrong_size_is_wrong_usage(tmp_path: Path, size: str) -> None:
    status, stderr, _ = start(tmp_path / "run", f"--state-size={size}")
    assert status == 2
    assert "is not a size such as" in stderr
