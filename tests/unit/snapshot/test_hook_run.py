# SPDX-License-Identifier: MIT
"""Hooks around a creation: real scripts."""

import time
from pathlib import Path

import pytest

from blksnap_ublk.errors import Failed
from blksnap_ublk.forms import Snapshot, SnapshotState, Storage
from blksnap_ublk.snapshot.hook_run import HookRun

STORAGE = Storage(used=0, capacity=0, limit=None, on_overflow="break", areas=[], forecast_seconds=None)
SNAPSHOT = Snapshot(
    id="0123abcd-0000-4000-8000-000000000001",
    created="2026-01-31T12:00:00.000000Z",
    state=SnapshotState.ACTIVE,
    error=None,
    frozen=False,
    gate_us=0,
    images=[],
    storage=STORAGE,
)


def script(folder: Path, phase: str, name: str, text: str) -> None:
    path = folder / f"{phase}.d" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def never() -> bool:
    return False


def test_both_phases_run_in_order(tmp_path: Path) -> None:
    note = tmp_path / "note"
    for phase in ("before", "after"):
        script(tmp_path, phase, "1", f"echo $BLKSNAP_PHASE $BLKSNAP_TAKEN $BLKSNAP_SNAPSHOT >> {note}")
    with HookRun(tmp_path) as hooks:
        hooks.before(SNAPSHOT, never)
        assert note.read_text() == f"before 0 {SNAPSHOT.id}\n"
        hooks.after(SNAPSHOT, taken=True)
    assert note.read_text().splitlines()[1] == f"after 1 {SNAPSHOT.id}"
    assert hooks.warnings() == []


def test_without_a_directory_nothing_is_done() -> None:
    with HookRun(None) as hooks:
        hooks.before(SNAPSHOT, never)
        hooks.after(SNAPSHOT, taken=True)
    assert hooks.warnings() == []


def test_what_fails_before_is_raised_and_after_it_is_a_warning(tmp_path: Path) -> None:
    for phase in ("before", "after"):
        script(tmp_path, phase, "no", "echo not now; exit 3")
    with HookRun(tmp_path) as hooks:
        with pytest.raises(Failed, match=r"before\.d/no.*not now"):
            hooks.before(SNAPSHOT, never)
        hooks.after(SNAPSHOT, taken=False)
    assert "after.d/no" in hooks.warnings()[0]


def test_a_hook_is_not_waited_for_in_vain_and_the_other_phase_comes_after_it(tmp_path: Path) -> None:
    note = tmp_path / "note"
    script(tmp_path, "before", "slow", f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; echo before >> {note}")
    script(tmp_path, "after", "1", f"echo after >> {note}")
    died = time.monotonic() + 0.3
    with HookRun(tmp_path) as hooks:
        with pytest.raises(Failed, match="io process died"):
            hooks.before(SNAPSHOT, lambda: time.monotonic() > died)
        assert not note.exists()
        hooks.after(SNAPSHOT, taken=False)
        (tmp_path / "go").touch()
    assert note.read_text().split() == ["before", "after"]
