# SPDX-License-Identifier: MIT
"""The note of immutable files, with files that are immutable."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk.host import pinned_files
from blksnap_ublk.host.inode_flags import set_immutable
from blksnap_ublk.host.pinned_files import PinnedFile
from tests.loop_devices import loop_device, missing_for_loops, mounted

missing = missing_for_loops()
pytestmark = pytest.mark.skipif(missing is not None, reason=f"loop devices: {missing}")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """On a file system that knows immutable files."""
    with loop_device(tmp_path / "disk", 16 << 20) as device, mounted(device, tmp_path / "ext4") as directory:
        yield directory


def _pinned(path: Path) -> PinnedFile:
    path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    set_immutable(descriptor, True)
    os.close(descriptor)
    return PinnedFile(str(path), path.stat().st_ino)


def test_noted_while_immutable_and_forgotten_after_it(tmp_path: Path, folder: Path) -> None:
    notes = tmp_path / "notes"
    one, other = _pinned(folder / "one"), _pinned(folder / "other")
    pinned_files.remember(notes, [one])
    pinned_files.remember(notes, [other])  # the first one is in use no more, but is as it was
    assert pinned_files.noted(notes) == [one, other]
    assert [pinned_files.is_pinned(file) for file in (one, other)] == [True, True]
    with pytest.raises(PermissionError):
        Path(one.path).write_text("x")
    pinned_files.release(one)
    Path(one.path).write_text("x")
    assert not pinned_files.is_pinned(one)
    pinned_files.remember(notes, [])
    assert pinned_files.noted(notes) == [other]
    pinned_files.release(other)
    assert [path.name for path in notes.iterdir()] == [pinned_files.NAME]


def test_another_file_under_the_name_is_left_alone(folder: Path) -> None:
    file = _pinned(folder / "one")
    stranger = PinnedFile(file.path, file.inode + 1)
    assert not pinned_files.is_pinned(stranger)
    with pytest.raises(FileNotFoundError):
        pinned_files.release(stranger)
    assert pinned_files.is_pinned(file)
    link = folder / "link"
    link.symlink_to(file.path)
    assert not pinned_files.is_pinned(PinnedFile(str(link), file.inode))
    subprocess.run(["chattr", "-i", file.path], check=True)


def test_a_note_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    assert pinned_files.noted(tmp_path / "nowhere") == []
    (tmp_path / pinned_files.NAME).write_text("{")
    assert pinned_files.noted(tmp_path) == []
