# SPDX-License-Identifier: MIT
"""Regular and unnamed files, on file systems made for the test."""

import fcntl
import mmap
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from blksnap_ublk.errors import BlksnapError, Busy, Failed, Unsupported, UsageError
from blksnap_ublk.host import blockdev, extents, stack
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.spec import parse_spec
from blksnap_ublk.snapshot.storage import AreaKind, DescriptorRegistry, Identity, Planned, UsedRange, open_storage
from blksnap_ublk.snapshot.storage.files import is_written, write_ahead
from blksnap_ublk.snapshot.storage.target import refuse_beneath_off_limits
from blksnap_ublk.snapshot.storages import write_areas_ahead
from tests.loop_devices import loop_device, run
from tests.unit.storage.conftest import MIB, Opener


def _make(path: Path, size: int, mode: int = 0o600) -> Path:
    """A sparse file."""
    with path.open("wb") as file:
        file.truncate(size)
    path.chmod(mode)
    return path


def _free(directory: Path) -> int:
    os.sync()
    return os.statvfs(directory).f_bfree


def test_an_existing_file_is_used_whole_and_its_holes_are_filled(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 4 * MIB + 700)
    with opened(str(path)) as areas:
        (area,) = areas.areas
        assert (area.path, area.kind, area.start_byte, area.length) == (str(path), AreaKind.FILE, 0, 4 * MIB + 512)
        assert area.direct
        assert (area.filesystem, area.device) == ("ext4", DeviceNumber.of(os.stat(ext4).st_dev))
        assert area.length % area.alignment == 0
        assert extents.holes(area.fd, 0, area.length) == []
        assert not area.written
        assert areas.capacity == area.length
        write_ahead(area.fd, 0, area.length // area.alignment * area.alignment)
        assert is_written(area.fd, 0, area.length)
    assert path.stat().st_size == 4 * MIB + 700


def test_a_limit_extends_a_file_that_is_too_small_and_undo_takes_that_back(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 2048)
    free = _free(ext4)
    areas = opened(str(path), limit=8 * MIB)
    assert areas.areas[0].length == 8 * MIB
    assert path.stat().st_blocks * 512 >= 8 * MIB
    areas.undo()
    assert path.stat().st_size == 2048
    assert _free(ext4) == free


def test_ranges_in_the_order_given_share_one_descriptor(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 4 * MIB)
    with opened(f"{path}:4096+2048,0+1024", f"{path}:1024+8") as areas:
        found = [(area.start_byte, area.length) for area in areas.areas]
        assert found == [(4096 * 512, 2048 * 512), (0, 1024 * 512), (1024 * 512, 4096)]
        assert len({area.fd for area in areas.areas}) == 1
        assert path.stat().st_blocks * 512 < 4 * MIB, "space outside of the ranges is not allocated"


def test_a_range_may_end_at_the_end_of_the_file_but_not_beyond(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 1 * MIB)
    opened(f"{path}:1024+1024").close()
    with pytest.raises(UsageError, match=r"1024\+1025 lies outside of the file, which has 2048 sectors"):
        opened(f"{path}:1024+1025", limit=64 * MIB)


def test_less_than_a_unit_is_refused(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 1 * MIB)
    opened(f"{path}:1+8").close()
    with pytest.raises(UsageError, match="no room for one unit"):
        opened(f"{path}:1+7")
    with pytest.raises(UsageError, match=r"no room for one unit|is empty"):
        opened(str(_make(ext4 / "small", 4095)))


def test_areas_are_cut_inward_to_what_direct_io_needs(
    make_loop: Callable[..., str], tmp_path: Path, opened: Opener
) -> None:
    device = make_loop("disk4k", 32 * MIB, "--sector-size", "4096")
    with opened(f"{device}:1+24") as areas:
        assert [(area.start_byte, area.length, area.alignment) for area in areas.areas] == [(4096, 8192, 4096)]
    with pytest.raises(UsageError, match="at a multiple of 4096"):
        opened(f"{device}:1+14")


def test_direct_io_works_on_the_area(ext4: Path, opened: Opener) -> None:
    with opened(f"{_make(ext4 / 'f', 1 * MIB)}:3+16") as areas, mmap.mmap(-1, 4096) as page:
        (area,) = areas.areas
        page.write(b"p" * 4096)
        assert os.pwrite(area.fd, page, area.start_byte) == 4096
        assert (ext4 / "f").read_bytes()[area.start_byte :][:4096] == b"p" * 4096


def test_a_missing_file_is_created_with_a_limit_only_when_all_is_well(ext4: Path, opened: Opener) -> None:
    path = ext4 / "fresh"
    with pytest.raises(UsageError, match=r"no such file.*--limit"):
        opened(str(path))
    with pytest.raises(UsageError):
        opened(str(path), f"{_make(ext4 / 'f', MIB)}:0+4096", limit=8 * MIB)
    with pytest.raises(UsageError, match="no such file"):
        opened(f"{path}:0+8", limit=8 * MIB)
    assert not path.exists()
    with opened(str(path), limit=8 * MIB) as areas:
        assert areas.areas[0].length == 8 * MIB
        assert areas.areas[0].kind is AreaKind.FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == 8 * MIB
    path.unlink()
    opened(str(path), limit=8 * MIB).undo()
    assert not path.exists()


@pytest.mark.parametrize("name", ["no-such-directory/f", "f/below-a-file", "dangling"])
def test_a_path_that_cannot_be_created_is_refused(ext4: Path, opened: Opener, name: str) -> None:
    _make(ext4 / "f", MIB)
    (ext4 / "dangling").symlink_to("nowhere")
    with pytest.raises(BlksnapError, match=name):
        opened(str(ext4 / name), limit=MIB)
    assert sorted(os.listdir(ext4)) == ["dangling", "f", "lost+found"]


def test_a_directory_gives_an_unnamed_private_file(ext4: Path, opened: Opener) -> None:
    free = _free(ext4)
    with opened(str(ext4), limit=8 * MIB) as areas:
        (area,) = areas.areas
        assert (area.kind, area.length, area.path) == (AreaKind.UNNAMED, 8 * MIB, str(ext4))
        status = os.fstat(area.fd)
        assert (status.st_nlink, stat.S_IMODE(status.st_mode), status.st_size) == (0, 0o600, 8 * MIB)
        assert _free(ext4) < free
        assert os.listdir(ext4) == ["lost+found"]
    assert _free(ext4) == free


def test_two_directories_on_one_file_system_share_its_room(ext4: Path, opened: Opener) -> None:
    (ext4 / "a").mkdir()
    (ext4 / "b").mkdir()
    with pytest.raises(Failed, match="ENOSPC"):
        opened(str(ext4 / "a"), str(ext4 / "b"), limit=1024 * MIB)


def test_without_a_limit_the_reserve_of_a_small_file_system_leaves_nothing(ext4: Path, opened: Opener) -> None:
    with pytest.raises(Failed, match=r"less than 1 MiB.*--limit"):
        opened(str(ext4))
    with pytest.raises(UsageError, match="no sector ranges"):
        opened(f"{ext4}:0+8")


def test_a_full_file_system_leaves_everything_as_it_was(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "sparse", 1024 * MIB, 0o644)
    free = _free(ext4)
    with pytest.raises(Failed, match=r"sparse: .*\(ENOSPC\)"):
        opened(str(_make(ext4 / "first", 2 * MIB)), str(path))
    assert path.stat().st_blocks == 0
    assert (ext4 / "first").stat().st_blocks == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert _free(ext4) == free


def test_what_others_may_read_is_made_private(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 1 * MIB, 0o644)
    areas = opened(str(path))
    assert areas.notes == (f"{path}: mode set to 0600: what it will hold is as secret as the disk",)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    areas.undo()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_locked_file_is_busy_and_its_holder_named(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 1 * MIB)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Busy, match=rf"locked by process {os.getpid()} "):
            opened(str(path))
    with opened(str(path)), pytest.raises(BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_sectors_of_another_storage_are_busy(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 4 * MIB)
    status = path.stat()
    identity = Identity(DeviceNumber.of(status.st_dev), status.st_ino)
    other = UsedRange(identity, 1 * MIB, 1 * MIB)
    for text in (str(path), f"{path}:2047+8", f"{path}:4095+8", f"{path}:0+8192"):
        with pytest.raises(Busy, match=r"2048\+2048 hold the storage of another snapshot"):
            opened(text, used=[other])
    opened(f"{path}:0+2048,4096+8", used=[other]).close()


def test_one_file_under_two_names_does_not_overlap_itself(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 4 * MIB)
    (ext4 / "g").hardlink_to(path)
    (ext4 / "h").symlink_to("f")
    with pytest.raises(UsageError, match="overlap"):
        opened(f"{path}:0+16", f"{ext4}/g:8+16")
    with pytest.raises(UsageError, match="overlap"):
        opened(str(path), f"{ext4}/h:8+16")
    opened(f"{path}:0+16", f"{ext4}/g:16+16", f"{ext4}/h:32+16").close()


def test_immutable_and_append_only_files_are_refused(ext4: Path, opened: Opener) -> None:
    if not shutil.which("chattr"):
        pytest.skip("no chattr")
    path = _make(ext4 / "f", 1 * MIB)
    for flag, words in (("i", "immutable"), ("a", "append-only")):
        run("chattr", f"+{flag}", str(path))
        try:
            with pytest.raises(UsageError, match=f"{words}; chattr -{flag}"):
                opened(str(path))
        finally:
            run("chattr", f"-{flag}", str(path))


def test_a_swap_file_is_refused(ext4: Path, opened: Opener) -> None:
    path = ext4 / "swap"
    path.write_bytes(bytes(1 * MIB))
    path.chmod(0o600)
    run("mkswap", str(path))
    try:
        run("swapon", str(path))
    except AssertionError as error:
        pytest.skip(f"no swap here: {error}")
    try:
        with pytest.raises(Busy, match="in use as swap"):
            opened(str(path))
    finally:
        run("swapoff", str(path))


def test_a_file_below_a_snapshotted_device_is_refused(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", 1 * MIB)
    beneath = DeviceNumber.of(os.stat(ext4).st_dev)
    for text, limit in ((str(path), None), (str(ext4), MIB), (str(ext4 / "missing"), MIB)):
        with pytest.raises(Unsupported, match="storage on the snapshotted device itself"):
            opened(text, limit=limit, off_limits=[beneath])
    opened(str(path), off_limits=[DeviceNumber(8, 77)]).close()


def test_files_that_are_written_through_the_page_cache_are_refused(
    make_mount: Callable[..., Path], opened: Opener
) -> None:
    path = _make(make_mount(options="data=journal") / "f", 1 * MIB)
    with pytest.raises(Unsupported, match="no direct I/O"):
        opened(str(path))


def test_tmpfs_is_accepted(opened: Opener) -> None:
    directory = Path("/dev/shm")
    if not os.access(directory, os.W_OK):
        pytest.skip("no /dev/shm")
    path = _make(directory / f"bsu-test-{os.getpid()}", 1 * MIB)
    try:
        with opened(f"{path}:1+1024", str(directory), limit=2 * MIB) as areas:
            file, unnamed = areas.areas
            assert (file.filesystem, file.device, file.written) == ("tmpfs", None, True)
            assert (file.start_byte, file.length) == (512, 1024 * 512)
            assert unnamed.length == 2 * MIB - 1024 * 512
            assert path.stat().st_blocks * 512 >= 1024 * 512
    finally:
        path.unlink()


def test_shared_blocks_are_refused(make_mount: Callable[..., Path], opened: Opener) -> None:
    if not shutil.which("mkfs.xfs"):
        pytest.skip("no mkfs.xfs")
    try:
        xfs = make_mount("xfs", 320 * MIB, "xfs", ["-m", "reflink=1"])
    except AssertionError as error:
        pytest.skip(f"no xfs here: {error}")
    path = xfs / "f"
    path.write_bytes(b"x" * MIB)
    with path.open("rb") as source, (xfs / "clone").open("wb") as clone:
        fcntl.ioctl(clone, 0x40049409, source.fileno())  # FICLONE
    with pytest.raises(Unsupported, match="reflink"):
        opened(str(path))
    own = _make(xfs / "own", 1 * MIB)
    with opened(f"{own}:0+2048", str(xfs), limit=4 * MIB) as areas:
        assert [(area.filesystem, area.length) for area in areas.areas] == [("xfs", MIB), ("xfs", 3 * MIB)]


def test_file_systems_that_move_or_pass_on_blocks_are_refused(make_mount: Callable[..., Path], opened: Opener) -> None:
    base = make_mount()
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir()
    layers = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    try:
        run("mount", "-t", "overlay", "overlay", "-o", layers, str(base / "merged"))
    except AssertionError as error:
        pytest.skip(f"no overlay here: {error}")
    try:
        path = _make(base / "merged/f", 1 * MIB)
        for text in (str(path), str(base / "merged"), str(base / "merged/missing")):
            with pytest.raises(Unsupported, match="lies on overlay"):
                opened(text, limit=MIB)
    finally:
        run("umount", str(base / "merged"))


def test_btrfs_is_refused(make_mount: Callable[..., Path], opened: Opener) -> None:
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("no mkfs.btrfs")
    try:
        btrfs = make_mount("btrfs", 128 * MIB, "btrfs")
    except AssertionError as error:
        pytest.skip(f"no btrfs here: {error}")
    with pytest.raises(Unsupported, match=r"lies on btrfs, which moves blocks.*name storage on ext4"):
        opened(str(_make(btrfs / "f", MIB)))


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/status", "/proc"])
def test_what_can_hold_nothing_is_refused(path: str, opened: Opener) -> None:
    with pytest.raises(BlksnapError, match=path):
        opened(path, limit=MIB)


def test_a_relative_path_is_refused(opened: Opener) -> None:
    with pytest.raises(UsageError, match="absolute"):
        opened("diff", limit=MIB)


def test_a_fifo_is_refused_without_waiting_for_its_other_end(tmp_path: Path, opened: Opener) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="neither a regular file"):
        opened(str(tmp_path / "fifo"))


def test_writing_ahead_leaves_data_alone(ext4: Path, opened: Opener) -> None:
    path = ext4 / "disk.img"
    data = os.urandom(2 * MIB)
    path.write_bytes(data)
    run("fallocate", "-o", str(2 * MIB), "-l", str(2 * MIB), str(path))
    with opened(str(path)) as areas:
        (area,) = areas.areas
        assert not area.written
        write_areas_ahead(areas)
        assert is_written(area.fd, area.start_byte, area.length)
    assert path.read_bytes() == data + bytes(2 * MIB)


def test_what_is_open_elsewhere_is_no_storage(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", MIB)
    with path.open("r+b"), pytest.raises(Busy, match="is open elsewhere"):
        opened(f"{path}:0+1024", limit=8 * MIB)
    with opened(f"{path}:0+1024"), opened(f"{path}:1024+1024"), path.open("rb"):
        pass


def test_what_belongs_to_a_user_is_no_storage(ext4: Path, opened: Opener) -> None:
    path = _make(ext4 / "f", MIB)
    os.chown(path, 1000, 1000)
    with pytest.raises(UsageError, match=r"belongs to user 1000.*chown"):
        opened(str(path))


def test_the_file_behind_a_device_of_ours_is_no_storage(
    ext4: Path, opened: Opener, make_loop: Callable[..., str]
) -> None:
    path = _make(ext4 / "f", MIB)
    run("losetup", "--find", str(path))
    device = run("losetup", "--noheadings", "--output", "NAME", "--associated", str(path))
    try:
        with pytest.raises(Busy, match="is open elsewhere"):
            opened(str(path))
        number = blockdev.device_number(device)
        assert (DeviceNumber.of(os.stat(path).st_dev), os.stat(path).st_ino) in stack.files_beneath(number)
        status = os.stat(path)
        identity = Identity(DeviceNumber.of(status.st_dev), status.st_ino)
        with pytest.raises(Unsupported, match=f"holds the data of {device}"):
            refuse_beneath_off_limits(str(path), identity, [number])
    finally:
        run("losetup", "--detach", device)


def test_a_device_behind_a_loop_device_is_no_storage(
    opened: Opener, make_loop: Callable[..., str], tmp_path: Path
) -> None:
    lower = make_loop("lower", 8 * MIB)
    with loop_device(Path(lower)) as upper, pytest.raises(Busy, match=f"{upper} rests on it.*losetup -d"):
        opened(lower)
    opened(lower).close()


def test_what_is_about_to_be_changed_is_announced_before(ext4: Path) -> None:
    """All of it, locked, and as it was."""
    registry = DescriptorRegistry()
    old = _make(ext4 / "old", MIB)
    seen: list[Planned] = []

    def announce(planned: Sequence[Planned]) -> None:
        seen.extend(planned)
        assert not (ext4 / "fresh").exists()
        assert old.stat().st_blocks == 0
        raise Failed("full")

    specs = [parse_spec(str(ext4 / "fresh")), parse_spec(str(old)), parse_spec(str(ext4))]
    with pytest.raises(Failed, match="full"):
        open_storage(specs, registry=registry, off_limits=(), limit=24 * MIB, needed=8 * MIB, announce=announce)
    assert [(each.path, each.former_size) for each in seen] == [(str(ext4 / "fresh"), -1), (str(old), MIB)]
    assert seen[0].size >= MIB
    assert seen[1].size == MIB
    assert old.stat().st_blocks == 0
    assert registry.held() == frozenset()
