# SPDX-License-Identifier: MIT
"""The room that is set aside."""

from pathlib import Path

from blksnap_ublk.snapshot.spare_file import SpareFile


def test_it_becomes_a_file_once(tmp_path: Path) -> None:
    spare = SpareFile(tmp_path / "spare")
    assert spare.become(tmp_path / "file", b"text" * 1000)
    assert (tmp_path / "file").read_bytes() == b"text" * 1000
    assert not spare.become(tmp_path / "other", b"x"), "nothing is set aside any more"
    assert not (tmp_path / "other").exists()
    spare.ensure(1)
    assert spare.become(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_it_grows(tmp_path: Path) -> None:
    spare = SpareFile(tmp_path / "spare")
    large = bytes(range(256)) * 4000
    assert not spare.become(tmp_path / "file", large)
    spare.ensure(len(large))
    assert spare.become(tmp_path / "file", large)
    assert (tmp_path / "file").read_bytes() == large


def test_it_is_found_again(tmp_path: Path) -> None:
    SpareFile(tmp_path / "spare").ensure(200_000)
    again = SpareFile(tmp_path / "spare")
    assert again.become(tmp_path / "file", bytes(200_000))
