# SPDX-License-Identifier: MIT
"""Files of difference storage that somebody deletes, replaces, cuts, punches or overwrites, and file systems of theirs
that stop or fail, under fio with verification: what must hold is in tests/lost_storage.py."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from tests.device_mapper import Mapped, mapped_table, missing_for_targets
from tests.filtered import granted_ways
from tests.full_file_systems import tmpfs
from tests.loop_devices import loop_device, mounted, run
from tests.lost_storage import MIB, SIZE, UNIT, lost_storage
from tests.own_daemon import OwnDaemon, wait_until

ONE_WAY = granted_ways()[-1]
SECTORS = 4 * SIZE // 512

no_dm = missing_for_targets("linear", "error")
needs_dm = pytest.mark.skipif(no_dm is not None, reason=str(no_dm))


# Files that somebody handles


@pytest.fixture(params=["ext4", "xfs", "tmpfs"])
def directory(request: pytest.FixtureRequest, folder: Path) -> Iterator[Path]:
    """Of a file system of its own; afterwards nothing of a storage may be left in it."""
    with ExitStack() as stack:
        if request.param == "tmpfs":
            path = stack.enter_context(tmpfs(folder / "files", 400 * MIB))
        else:
            base = stack.enter_context(loop_device(folder / "base", 400 * MIB))
            path = stack.enter_context(mounted(base, folder / "files", request.param))
        free = _free_bytes(path)
        yield path
        for name in os.listdir(path):
            if name != "lost+found":
                (path / name).unlink()
        # xfs frees what was deleted a moment later.
        wait_until("all space is free again", lambda: _free_bytes(path) >= free - MIB)


def _free_bytes(directory: Path) -> int:
    run("sync", "--file-system", str(directory))
    status = os.statvfs(directory)
    return status.f_bfree * status.f_bsize


def storage_file(directory: Path) -> Path:
    path = directory / "storage"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 * SIZE)
    return path


def test_a_file_that_is_deleted_goes_on_working(
    daemon: OwnDaemon, client: Client, folder: Path, directory: Path
) -> None:
    path = storage_file(directory)
    with lost_storage(daemon, client, folder, ONE_WAY, str(path)) as story:
        path.unlink()
        story.overwrite()
        story.load.wait_for_round()
        story.expect_active()


def test_a_file_that_is_replaced_goes_on_working_and_the_other_one_is_left_alone(
    daemon: OwnDaemon, client: Client, folder: Path, directory: Path
) -> None:
    """The storage is the file that was opened, whatever has its name."""
    path = storage_file(directory)
    with lost_storage(daemon, client, folder, ONE_WAY, str(path)) as story:
        (directory / "other").write_bytes(b"mine" * MIB)
        (directory / "other").rename(path)
        story.overwrite()
        story.load.wait_for_round()
        story.expect_active()
    assert path.read_bytes() == b"mine" * MIB


FILE_FAULTS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, UNIT + 512),
    "punched": lambda path: run("fallocate", "--punch-hole", "--offset", "0", "--length", str(2 * SIZE), str(path)),
    "overwritten": lambda path: run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=48", "conv=notrunc"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_file_that_is_changed_never_gives_wrong_data(
    daemon: OwnDaemon, client: Client, folder: Path, directory: Path, fault: str
) -> None:
    path = storage_file(directory)
    with lost_storage(daemon, client, folder, ONE_WAY, str(path)) as story:
        story.load.wait_for_round()
        FILE_FAULTS[fault](path)
        story.overwrite()
        assert story.read_image() > 0
        shown = story.show()
        story.expect_lost("corrupted", str(shown.error))


@contextmanager
def mounted_on_dm(folder: Path) -> Iterator[tuple[Path, Mapped, str]]:
    """An ext4, the dm device that it lies on, and the loop device beneath."""
    with ExitStack() as stack:
        base = stack.enter_context(loop_device(folder / "base", SECTORS * 512))
        name = f"bsu-{os.getpid()}-files"
        mapped = stack.enter_context(mapped_table(name, f"0 {SECTORS} linear {base} 0"))
        yield stack.enter_context(mounted(mapped.path, folder / "files")), mapped, base


@needs_dm
def test_a_file_system_that_is_cut_off(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    """The disk beneath the file system of the storage fails."""
    with ExitStack() as stack:
        files, mapped, base = stack.enter_context(mounted_on_dm(folder))
        path = storage_file(files)
        story = stack.enter_context(lost_storage(daemon, client, folder, ONE_WAY, f"{path}:0+{SIZE // 512}"))
        os.sync()
        mapped.load(f"0 {SECTORS} error")
        stack.callback(mapped.load, f"0 {SECTORS} linear {base} 0")
        story.wait_until_lost()
        story.expect_lost("corrupted", str(story.show().error))


@pytest.mark.parametrize("grows", [False, True])
def test_a_file_system_that_is_frozen_for_ten_seconds_loses_nothing(
    daemon: OwnDaemon, client: Client, folder: Path, grows: bool
) -> None:
    """By somebody else; with room enough, and when it should grow in this moment."""
    with ExitStack() as stack:
        base = stack.enter_context(loop_device(folder / "base", 400 * MIB))
        files = stack.enter_context(mounted(base, folder / "files"))
        path = files / "storage"
        path.write_bytes(bytes(MIB if grows else 2 * SIZE))
        story = stack.enter_context(
            lost_storage(daemon, client, folder, ONE_WAY, str(path), limit=2 * SIZE, on_overflow="pause:60")
        )
        run("fsfreeze", "--freeze", str(files))
        thaw = threading.Timer(10, run, ("fsfreeze", "--unfreeze", str(files)))
        thaw.start()
        try:
            story.overwrite()
        finally:
            thaw.join()
        story.load.wait_for_round()
        story.expect_active()


@needs_dm
def test_growth_that_hangs_for_ten_seconds_loses_nothing(daemon: OwnDaemon, client: Client, folder: Path) -> None:
    """The disk beneath the file system does not answer while the file should be made longer."""
    with ExitStack() as stack:
        files, mapped, _ = stack.enter_context(mounted_on_dm(folder))
        path = files / "storage"
        path.write_bytes(bytes(MIB))
        story = stack.enter_context(
            lost_storage(daemon, client, folder, ONE_WAY, str(path), limit=2 * SIZE, on_overflow="pause:60")
        )
        mapped.suspend()
        resume = threading.Timer(10, mapped.resume)
        resume.start()
        try:
            story.overwrite()
        finally:
            resume.join()
        story.load.wait_for_round()
        story.expect_active()
