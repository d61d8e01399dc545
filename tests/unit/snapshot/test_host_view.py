# SPDX-License-Identifier: MIT
"""Paths as the host means them."""

from pathlib import Path

import pytest

from blksnap_ublk.snapshot import host_view


def test_a_path_that_is_the_same_inside_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_view, "_HOST", "/proc/self/root")
    (tmp_path / "there").touch()
    for name in ("there", "not there"):
        assert host_view.find(str(tmp_path / name)) == str(tmp_path / name)


def test_a_path_that_is_another_inside_is_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = tmp_path / "host"
    monkeypatch.setattr(host_view, "_HOST", str(host))
    inside = tmp_path / "disk"
    outside = Path(f"{host}{inside}")
    outside.mkdir(parents=True)
    inside.mkdir()
    (outside / "file").touch()
    for name in ("file", "to be made"):
        assert host_view.find(str(inside / name)) == f"{outside}/{name}"
    assert host_view.name(f"{outside}/file: full") == f"{inside}/file: full"


def test_a_host_that_cannot_be_seen_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_view, "_HOST", str(tmp_path / "none"))
    assert host_view.find("/some/path") == "/some/path"
