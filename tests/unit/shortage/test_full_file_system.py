# SPDX-License-Identifier: MIT
"""File systems that are full for real: with room for no page, one page, two … until what is made has room enough.

Each attempt that fails gives one clear error, leaves no file and no space behind, and hurts nothing that was there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blksnap_ublk.cbt import FoldPolicy, History, mapped_file
from blksnap_ublk.errors import Failed
from blksnap_ublk.snapshot.spec import parse_spec
from blksnap_ublk.snapshot.state_files import StateFiles
from blksnap_ublk.snapshot.storage import DescriptorRegistry, open_storage
from tests.loop_devices import loop_device, missing_for_loops, mounted, run
from tests.unit.cbt.model import Model, expected_files, files_of, mark

PAGE = 4096
PAGES = 256
MIB = 1 << 20


class SmallDisk:
    """A file system whose free space a test chooses, by a file that takes the rest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"

    @property
    def free(self) -> int:
        """Bytes; what a file that is gone had comes back with the next sync."""
        run("sync", "--file-system", str(self.directory))
        status = os.statvfs(self.directory)
        return status.f_bfree * status.f_bsize

    def leave(self, free: int) -> None:
        """So many bytes are free from now on; what a file needs beside its data is among them."""
        self._ballast.unlink(missing_ok=True)
        piece = max(self.free // 64 // PAGE, 1) * PAGE
        with self._ballast.open("wb") as file:
            size = 0
            while piece:
                try:
                    os.posix_fallocate(file.fileno(), size, piece)
                    size += piece
                except OSError:
                    os.ftruncate(file.fileno(), size)
                    piece = piece // 2 // PAGE * PAGE
            os.ftruncate(file.fileno(), size - free)

    def names(self) -> list[str]:
        """All but the ballast."""
        return sorted(set(os.listdir(self.directory)) - {"ballast"})


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[SmallDisk]:
    """Like the one that state files lie on."""
    if os.geteuid() != 0:
        pytest.skip("not root: a small tmpfs cannot be mounted")
    directory = tmp_path / "tmpfs"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={PAGES * PAGE}", "tmpfs", str(directory))
    try:
        yield SmallDisk(directory)
    finally:
        run("umount", str(directory))


def until_there_is_room(disk: SmallDisk, action: Callable[[], object], *, step: int = PAGE) -> int:
    """Tries with `step` bytes more each time; returns how often there was no room."""
    names = disk.names()
    refusals = 0
    while True:
        disk.leave(refusals * step)
        free = disk.free
        try:
            action()
        except (Failed, OSError) as error:
            if getattr(error, "errno", None) != errno.ENOSPC and "(ENOSPC)" not in str(error):
                raise
        else:
            return refusals
        assert disk.names() == names
        assert disk.free == free
        refusals += 1


def test_state_files(tmpfs: SmallDisk) -> None:
    state = StateFiles(tmpfs.directory)
    os.close(state.create("before", PAGE))
    assert until_there_is_room(tmpfs, lambda: os.close(state.create("file", 9 * PAGE))) == 9
    assert tmpfs.names() == ["before", "file"]
    assert (tmpfs.directory / "file").read_bytes() == bytes(9 * PAGE)


def test_a_state_file_that_is_replaced_gives_its_room_to_the_next(tmpfs: SmallDisk) -> None:
    state = StateFiles(tmpfs.directory)
    os.close(state.create("file", 9 * PAGE))
    tmpfs.leave(0)
    os.close(state.create("file", 9 * PAGE))


def test_mapped_files(tmpfs: SmallDisk) -> None:
    path = tmpfs.directory / "file"
    assert until_there_is_room(tmpfs, lambda: mapped_file.create(path, 7 * PAGE)) == 7
    path.write_bytes(b"\x55" * 7 * PAGE)
    assert until_there_is_room(tmpfs, lambda: mapped_file.extend(path, 7 * PAGE, 12 * PAGE)) == 5
    assert path.read_bytes() == b"\x55" * 7 * PAGE + bytes(5 * PAGE)


STEPS: dict[str, Callable[[History, Model], object]] = {
    "prepare": lambda history, model: history.prepare(),
    "commit": lambda history, model: history.commit(model.number),
    "destroy": lambda history, model: history.destroy(2),
    "fold": lambda history, model: history.fold(),
    "lose": lambda history, model: history.lose("unclean"),
}


@pytest.mark.parametrize("name", STEPS)
def test_change_history(tmpfs: SmallDisk, name: str) -> None:
    directory = tmpfs.directory / "history"
    directory.mkdir()
    history, model = history_before(name, directory)

    def attempt() -> None:
        before = files_of(directory)
        try:
            STEPS[name](history, model)
        except OSError:
            assert files_of(directory) == before == expected_files(history)
            raise

    refusals = until_there_is_room(tmpfs, attempt)
    if name == "prepare":
        assert refusals > 0
    elif name == "commit":
        model.held.add(model.number)
    elif name == "destroy":
        model.held.remove(2)
    elif name == "lose":
        model.lose("unclean")
    for found in (history, History.open(directory)):
        model.check(found)


def history_before(name: str, directory: Path) -> tuple[History, Model]:
    history = History.create(directory, 3 * 4096 * 4096, 4096, policy=FoldPolicy(always=True))
    model = Model(history.blocks)
    for number, changed in enumerate([[1, 2], [2, 5000], [3]], start=1):
        mark(history.active, changed)
        model.active |= set(changed)
        history.prepare()
        history.commit(number)
        model.take()
    if name == "commit":
        mark(history.active, [7])
        history.prepare()
        model.intervals.append({7})
    if name == "fold":
        for number in (2, 3):
            history.destroy(number)
            model.held.remove(number)
    return history, model


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[SmallDisk]:
    """What a difference storage lies on."""
    if missing := missing_for_loops():
        pytest.skip(f"loop devices: {missing}")
    with (
        loop_device(tmp_path / "disk", 16 * MIB) as device,
        mounted(device, tmp_path / "ext4", mkfs=["-m", "0", "-N", "64", "-O", "^has_journal"]) as directory,
    ):
        yield SmallDisk(directory)


REFUSALS = {"a sparse file": 7, "a new file": 1, "an unnamed file": 1, "a file that grows": 0}
"""What grows begins with the room that there is, the others have to have it all."""


@pytest.mark.parametrize("kind", ["a new file", "an unnamed file", "a sparse file", "a file that grows"])
def test_difference_storage(ext4: SmallDisk, kind: str) -> None:
    path = ext4.directory / "storage"
    limit: int | None = MIB
    if kind == "a sparse file":
        path.touch()
        os.truncate(path, MIB)
        limit = None
    elif kind == "a file that grows":
        path.write_bytes(b"\x55" * PAGE)
    registry = DescriptorRegistry()
    spec = parse_spec(str(ext4.directory if kind == "an unnamed file" else path))
    sizes = path.stat().st_size if path.exists() else None

    def attempt() -> None:
        try:
            opened = open_storage([spec], registry=registry, off_limits=(), used=(), limit=limit, needed=MIB)
        except Failed:
            assert (path.stat().st_size if path.exists() else None) == sizes
            raise
        with opened:
            assert opened.capacity >= (MIB if limit is None else PAGE)

    assert until_there_is_room(ext4, attempt, step=MIB // 8) >= REFUSALS[kind]
    assert registry.held() == frozenset()
