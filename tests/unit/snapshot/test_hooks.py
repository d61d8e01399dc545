# SPDX-License-Identifier: MIT
"""Hooks, as real scripts: what they get, what their failure does, and that none can hold up the daemon."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from blksnap_ublk.errors import BlksnapError, Failed
from blksnap_ublk.snapshot import hooks

ID = "11111111-2222-3333-4444-555555555555"
SNAPSHOT = json.dumps({"id": ID, "images": []}).encode()


def hook(directory: Path, name: str, script: str, mode: int = 0o755) -> Path:
    """`name` is `before.d/NAME` or `after.d/NAME`."""
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return path


def test_no_directory_and_no_hooks(tmp_path: Path) -> None:
    for directory in (None, tmp_path, tmp_path / "missing"):
        hooks.run_before(directory, SNAPSHOT)
        assert hooks.run_after(directory, SNAPSHOT, taken=True) == []


def test_they_run_by_name_with_the_snapshot(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("20-b", "10-a", "100-c"):
        hook(tmp_path, f"before.d/{name}", f"echo {name} $BLKSNAP_PHASE $BLKSNAP_TAKEN $BLKSNAP_SNAPSHOT >>{out}")
    hook(tmp_path, "before.d/30-d", f"cat >>{out}; pwd >>{out}")
    hooks.run_before(tmp_path, SNAPSHOT)
    lines = out.read_text().splitlines()
    assert lines[:3] == [f"{name} before 0 {ID}" for name in ("10-a", "100-c", "20-b")]
    assert lines[3] == SNAPSHOT.decode() + "/"


@pytest.mark.parametrize("taken", [False, True])
def test_after_knows_whether_it_was_taken(tmp_path: Path, taken: bool) -> None:
    hook(tmp_path, "after.d/a", f"echo $BLKSNAP_PHASE $BLKSNAP_TAKEN >>{tmp_path}/out")
    assert hooks.run_after(tmp_path, SNAPSHOT, taken=taken) == []
    assert (tmp_path / "out").read_text() == f"after {int(taken)}\n"


def test_a_failure_before_aborts_with_its_message(tmp_path: Path) -> None:
    path = hook(tmp_path, "before.d/1", "echo begin; echo 'the database is busy' >&2; exit 3")
    hook(tmp_path, "before.d/2", f"touch {tmp_path}/ran")
    with pytest.raises(Failed) as caught:
        hooks.run_before(tmp_path, SNAPSHOT)
    assert caught.value.message == f"{path}: ended with status 3: the database is busy"
    assert not (tmp_path / "ran").exists()


def test_failures_after_are_warnings_and_all_run(tmp_path: Path) -> None:
    first = hook(tmp_path, "after.d/1", "exit 1")
    second = hook(tmp_path, "after.d/2", "kill -9 $$")
    hook(tmp_path, "after.d/3", f"touch {tmp_path}/ran")
    assert hooks.run_after(tmp_path, SNAPSHOT, taken=True) == [
        f"{first}: ended with status 1, without a message",
        f"{second}: was ended by SIGKILL, without a message",
    ]
    assert (tmp_path / "ran").exists()


def test_what_is_not_executable_or_hidden_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    readme = hook(tmp_path, "before.d/README", "exit 1", mode=0o644)
    hook(tmp_path, "before.d/.hidden", "exit 1")
    (tmp_path / "before.d/directory").mkdir()
    hooks.run_before(tmp_path, SNAPSHOT)
    assert str(readme) in caplog.text


@pytest.mark.parametrize("content", ["#!/no/such/program\n", "\0\0\0"])
def test_what_cannot_be_run_is_a_failure(tmp_path: Path, content: str) -> None:
    path = hook(tmp_path, "before.d/1", "")
    path.write_text(content)
    with pytest.raises(Failed, match=rf"{path}: cannot be run \(E"):
        hooks.run_before(tmp_path, SNAPSHOT)
    assert len(hooks.run_after(tmp_path, SNAPSHOT, taken=False)) == 0


def test_a_dangling_link_and_a_file_for_a_folder_are_failures(tmp_path: Path) -> None:
    (tmp_path / "before.d").mkdir()
    (tmp_path / "before.d/1").symlink_to("/no/such/file")
    with pytest.raises(BlksnapError, match=r"before\.d/1: cannot be run \(ENOENT\)"):
        hooks.run_before(tmp_path, SNAPSHOT)
    hook(tmp_path, "after.d/2", f"touch {tmp_path}/ran")
    (tmp_path / "after.d/1").symlink_to("/no/such/file")
    assert len(hooks.run_after(tmp_path, SNAPSHOT, taken=True)) == 1
    assert (tmp_path / "ran").exists()
    shutil.rmtree(tmp_path / "after.d")
    (tmp_path / "after.d").touch()
    (warning,) = hooks.run_after(tmp_path, SNAPSHOT, taken=True)
    assert "ENOTDIR" in warning


def test_the_limit_kills_the_hook_and_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "LIMIT", 0.3)
    hook(tmp_path, "before.d/1", f"sleep 1000 & echo $! >{tmp_path}/child; trap '' TERM; wait; sleep 1000")
    with pytest.raises(Failed, match=r"did not end within 0\.3 s"):
        hooks.run_before(tmp_path, SNAPSHOT)
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 30
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_child_that_keeps_the_output_open_is_not_waited_for(tmp_path: Path) -> None:
    """It would be until the limit: the hook would fail then."""
    hook(tmp_path, "before.d/1", f"setsid sleep 1000 & echo $! >{tmp_path}/child; echo started")
    try:
        hooks.run_before(tmp_path, SNAPSHOT)
    finally:
        with suppress(ProcessLookupError):
            os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_child_that_never_stops_writing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_DRAIN", 0.2)
    hook(tmp_path, "before.d/1", f"setsid yes & echo $! >{tmp_path}/child")
    hooks.run_before(tmp_path, SNAPSHOT)
    end = time.monotonic() + 30
    while is_running(int((tmp_path / "child").read_text())):  # nobody reads its pipe any more
        assert time.monotonic() < end
        time.sleep(0.05)


def test_much_output_is_read_and_only_its_end_kept(tmp_path: Path) -> None:
    hook(tmp_path, "before.d/1", "head -c 50000000 /dev/zero; head -c 9999 /dev/zero | tr '\\0' x; exit 1")
    with pytest.raises(Failed) as caught:
        hooks.run_before(tmp_path, SNAPSHOT)
    assert len(caught.value.message) < 1000
    assert caught.value.message.endswith("x" * 500)


def test_output_that_is_not_utf8_becomes_one_printable_line(tmp_path: Path) -> None:
    hook(tmp_path, "before.d/1", r"printf 'bad \377\376 \033[31mred\n\n'; exit 1")
    with pytest.raises(Failed) as caught:
        hooks.run_before(tmp_path, SNAPSHOT)
    assert caught.value.message.endswith(r"ended with status 1: bad \xff\xfe [31mred")


def test_json_that_is_not_read_does_no_harm(tmp_path: Path) -> None:
    big = json.dumps({"id": ID, "filler": "x" * (1 << 20)}).encode()
    hook(tmp_path, "before.d/1", "exec <&-; exit 0")
    hook(tmp_path, "before.d/2", f"wc -c >{tmp_path}/count")
    hooks.run_before(tmp_path, big)
    assert int((tmp_path / "count").read_text()) == len(big)


def test_nothing_stays_open(tmp_path: Path) -> None:
    hook(tmp_path, "after.d/1", "exit 1")
    hook(tmp_path, "after.d/2", "").write_text("#!/no/such/program\n")
    before = set(os.listdir("/proc/self/fd"))
    assert len(hooks.run_after(tmp_path, SNAPSHOT, taken=True)) == 2
    assert set(os.listdir("/proc/self/fd")) == before


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
