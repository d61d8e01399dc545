# SPDX-License-Identifier: MIT
"""Files that helper processes reserve and give back, on file systems made for the test."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.errors import BlksnapError, Busy, Failed, Unsupported, UsageError
from blksnap_ublk.host import extents
from blksnap_ublk.host.inode_flags import set_immutable
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.catalogue import AreaEntry
from blksnap_ublk.snapshot.spec import Spec, parse_spec
from blksnap_ublk.snapshot.storage import DescriptorRegistry, Identity, OpenAreas, open_storage
from blksnap_ublk.snapshot.storage.areas import OpenArea
from blksnap_ublk.snapshot.storage.beneath import Seat, verify
from blksnap_ublk.snapshot.storage.reservation import GivingBack, Reservation
from tests.loop_devices import run
from tests.same_device import free, is_immutable, refuses
from tests.unit.storage.conftest import MIB

Mount = Callable[..., Path]
UNIT = 4096


@pytest.fixture
def ext4(make_mount: Mount) -> Path:
    """With blocks as large as a unit."""
    return make_mount(mkfs=("-b", "4096"))


def _seat(directory: Path) -> Seat:
    return Seat("key", "/dev/loop", UNIT, DeviceNumber.of(os.stat(directory).st_dev), 0)


def _device(directory: Path) -> str:
    return run("findmnt", "-no", "SOURCE", str(directory))


@contextmanager
def _opened(
    *texts: str, directory: Path, limit: int | None = None, given_up: Callable[[], bool] = lambda: False
) -> Iterator[OpenAreas]:
    registry = DescriptorRegistry()
    specs = [parse_spec(text) for text in texts]
    seats = {spec.path: _seat(directory) for spec in specs if spec.path.startswith(str(directory))}
    found = open_storage(
        specs, registry=registry, off_limits=(), limit=limit, needed=MIB, unit=UNIT, seats=seats, given_up=given_up
    )
    try:
        yield found
    finally:
        found.close()
        assert registry.held() == frozenset()


def _entries(areas: tuple[OpenArea, ...], former: int | None = None) -> list[AreaEntry]:
    return [
        AreaEntry(
            area.path,
            "name",
            (area.identity.device.major, area.identity.device.minor),
            area.identity.inode,
            area.start_byte,
            area.length,
            former_size=former,
            beneath=area.beneath,
            physical=area.physical,
        )
        for area in areas
    ]


def _give_back(path: Path, descriptor: int | None, former: int | None, longest: int = 1 << 40) -> str | None:
    status = os.stat(path)
    identity = Identity(DeviceNumber.of(status.st_dev), status.st_ino)
    with GivingBack(str(path), identity, descriptor, former, longest, lambda: False) as given:
        return given.warning


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_is_written_beneath_lies_in_the_file(make_mount: Mount, kind: str) -> None:
    """Also without a file system in between: the pieces are those of the device."""
    if not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"no mkfs.{kind}")
    point = make_mount(size=384 * MIB, kind=kind, mkfs=("-b", "1024") if kind == "ext4" else ())
    path = point / "storage"
    path.write_bytes(b"\xaa" * (8 * MIB))
    with _opened(str(path), directory=point) as areas:
        assert 8 * MIB - len(areas.areas) * 2 * UNIT <= sum(area.length for area in areas.areas) <= 8 * MIB
        assert all(area.written and area.beneath == "key" for area in areas.areas)
        assert is_immutable(path)
        device = os.open(_device(point), os.O_WRONLY | os.O_DIRECT)
        with mmap.mmap(-1, UNIT) as page:
            for n, area in enumerate(areas.areas):
                page[:] = bytes([n + 1]) * UNIT
                assert area.physical is not None
                os.pwritev(device, [page], area.physical)
        os.close(device)
        run("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
        data = path.read_bytes()
        for n, area in enumerate(areas.areas):
            assert data[area.start_byte : area.start_byte + UNIT] == bytes([n + 1]) * UNIT
        areas.undo()
    assert not is_immutable(path)


def test_a_directory_gives_an_unnamed_file_of_the_whole_limit(ext4: Path) -> None:
    before = free(ext4)
    with _opened(str(ext4), directory=ext4, limit=16 * MIB) as areas:
        assert areas.capacity == 16 * MIB
        assert before - free(ext4) >= 16 * MIB
        areas.undo()
    assert free(ext4) == before


def test_a_missing_file_is_made_and_removed(ext4: Path) -> None:
    path = ext4 / "made"
    with _opened(str(path), directory=ext4, limit=4 * MIB) as areas:
        assert path.stat().st_size == 4 * MIB
        assert is_immutable(path)
        assert refuses("rm", "-f", str(path))
        areas.undo()
    assert not path.exists()


def test_without_a_limit_there_is_nothing_to_reserve(ext4: Path) -> None:
    for path in (ext4, ext4 / "missing"):
        with pytest.raises(UsageError, match="give --limit SIZE"), _opened(str(path), directory=ext4):
            pass
    (ext4 / "empty").touch()
    with pytest.raises(UsageError, match="it is empty"), _opened(str(ext4 / "empty"), directory=ext4):
        pass
    assert not is_immutable(ext4 / "empty")


def test_a_limit_extends_a_file_and_its_holes_are_filled(ext4: Path) -> None:
    path = ext4 / "file"
    with path.open("wb") as file:
        file.truncate(2 * MIB)
    path.chmod(0o644)
    with _opened(str(path), directory=ext4, limit=6 * MIB) as areas:
        assert (areas.capacity, path.stat().st_size, path.stat().st_mode & 0o777) == (6 * MIB, 6 * MIB, 0o600)
        assert areas.notes == (f"{path}: mode set to 0600: what it will hold is as secret as the disk",)
        areas.undo()
    assert (path.stat().st_size, path.stat().st_mode & 0o777) == (2 * MIB, 0o644)
    assert not is_immutable(path)
    assert path.stat().st_blocks == 0


def test_ranges_of_a_file(ext4: Path) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(2 * MIB))
    with _opened(f"{path}:8+16,1024+1024", directory=ext4) as areas:
        assert [(area.start_byte, area.length) for area in areas.areas] == [(4096, 8192), (512 << 10, 512 << 10)]
        areas.undo()
    with pytest.raises(UsageError, match="outside of the file"), _opened(f"{path}:4090+8", directory=ext4):
        pass
    assert not is_immutable(path)


def test_more_than_there_is_room_for(ext4: Path) -> None:
    before = free(ext4)
    with pytest.raises(Failed, match=r"no room for .* bytes.*ENOSPC"):  # noqa: SIM117
        with _opened(str(ext4), directory=ext4, limit=1 << 30):
            pass
    assert free(ext4) == before


def test_kept_it_stays_until_it_is_given_back(ext4: Path) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(MIB))
    with _opened(str(path), directory=ext4, limit=3 * MIB) as areas:
        areas.keep()
        descriptor = os.dup(areas.areas[0].fd)
        entries = _entries(areas.areas)
    assert is_immutable(path)
    assert verify(entries, descriptor) is None
    assert refuses("truncate", "-s", "0", str(path))
    assert _give_back(path, descriptor, MIB) is None
    assert not is_immutable(path)
    assert path.stat().st_size == MIB
    assert verify(entries, descriptor) == f"the file was truncated to {MIB} bytes"
    os.close(descriptor)


def test_undone_although_it_was_to_be_kept(ext4: Path) -> None:
    path = ext4 / "made"
    with _opened(str(path), directory=ext4, limit=3 * MIB) as areas:
        areas.keep()
        areas.undo()
    assert not path.exists()


@pytest.mark.parametrize("keep", [False, True])
def test_a_helper_whose_daemon_dies(ext4: Path, keep: bool) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(MIB))
    reservation = Reservation(Spec(str(path)), _seat(ext4), lambda: False)
    descriptor, _ = reservation.open()
    reservation.reserve(2 * MIB, UNIT)
    if keep:
        reservation.keep()
    os.close(descriptor)
    reservation.close()  # its end of the socket is closed, as at the death of a process
    assert is_immutable(path) == keep
    assert path.stat().st_size == (2 * MIB if keep else MIB)
    assert _give_back(path, None, MIB) is None
    assert not is_immutable(path)
    assert path.stat().st_size == MIB


def test_given_back_by_its_path_it_is_found_only_where_it_still_is(ext4: Path) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(MIB))
    identity = Identity(DeviceNumber.of(os.stat(path).st_dev), os.stat(path).st_ino)
    path.rename(ext4 / "other")
    path.write_bytes(bytes(MIB))
    with GivingBack(str(path), identity, None, -1, 0, lambda: False) as given:
        assert given.warning is None
    assert path.exists()
    (ext4 / "other").rename(path)
    with GivingBack(str(path), identity, None, -1, 0, lambda: False) as given:
        assert given.warning is None
    assert not path.exists()


def test_nothing_is_waited_for_when_the_device_is_not_served(ext4: Path) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(MIB))
    with pytest.raises(Failed, match="the io process died"):  # noqa: SIM117
        with _opened(str(path), directory=ext4, given_up=lambda: True):
            pass
    run("sh", "-c", f"for n in $(seq 100); do lsattr {path} | grep -q i- || exit 0; sleep 0.1; done; exit 1")


def _journalled(point: Path) -> Path:
    path = point / "file"
    path.write_bytes(bytes(MIB))
    done = subprocess.run(["chattr", "+j", str(path)], capture_output=True, text=True, check=False)
    if "not permitted" in done.stderr:
        pytest.skip("chattr +j is refused without CAP_SYS_RESOURCE")
    assert done.returncode == 0, done.stderr
    return path


def _immutable(point: Path) -> Path:
    path = point / "file"
    path.write_bytes(bytes(MIB))
    run("chattr", "+i", str(path))
    return path


@pytest.mark.parametrize(
    ("make", "kind", "reason"),
    [(_journalled, Unsupported, "direct I/O|journal"), (_immutable, UsageError, "immutable")],
    ids=["journalled", "immutable"],
)
def test_unfit_files_are_refused(
    ext4: Path, make: Callable[[Path], Path], kind: type[BlksnapError], reason: str
) -> None:
    path = make(ext4)
    with pytest.raises(kind, match=reason), _opened(str(path), directory=ext4):
        pass
    run("chattr", "-i", str(path))


def test_a_file_that_is_open_elsewhere_is_refused(ext4: Path) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(MIB))
    with path.open("r+b"), pytest.raises(Busy, match="is open elsewhere"):  # noqa: SIM117
        with _opened(str(path), directory=ext4):
            pass
    assert not is_immutable(path)
    with _opened(str(path), directory=ext4) as areas:
        areas.undo()


def test_swap_is_refused(ext4: Path) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(MIB))
    path.chmod(0o600)
    run("mkswap", str(path))
    if subprocess.run(["swapon", str(path)], capture_output=True).returncode:
        pytest.skip("no swap files here")
    try:
        with pytest.raises(Busy, match="in use as swap"), _opened(str(path), directory=ext4):
            pass
    finally:
        run("swapoff", str(path))


def test_shared_blocks_are_refused(make_mount: Mount) -> None:
    if not shutil.which("mkfs.xfs"):
        pytest.skip("no mkfs.xfs")
    point = make_mount(size=384 * MIB, kind="xfs")
    path = point / "file"
    path.write_bytes(bytes(MIB))
    run("cp", "--reflink=always", str(path), str(point / "copy"))
    with pytest.raises(Unsupported, match="reflink"), _opened(str(path), directory=point):
        pass
    assert not is_immutable(path)


def test_files_on_a_realtime_device_are_refused(make_loop: Callable[..., str], tmp_path: Path) -> None:
    if not shutil.which("mkfs.xfs"):
        pytest.skip("no mkfs.xfs")
    data, realtime = make_loop("data.img", 384 * MIB), make_loop("realtime.img", 64 * MIB)
    run("mkfs.xfs", "-qf", "-r", f"rtdev={realtime}", "-d", "rtinherit=1", "-m", "reflink=0,rmapbt=0", data)
    point = tmp_path / "realtime"
    point.mkdir()
    if subprocess.run(["mount", "-o", f"rtdev={realtime}", data, str(point)], capture_output=True).returncode:
        pytest.skip("this kernel mounts no realtime devices")
    with ExitStack() as stack:
        stack.callback(run, "umount", str(point))
        with pytest.raises(Unsupported, match="realtime device"), _opened(str(point), directory=point, limit=MIB):
            pass


def test_moved_blocks_are_seen(ext4: Path) -> None:
    path, other = ext4 / "file", ext4 / "other"
    for each in (path, other):
        each.write_bytes(os.urandom(MIB))
    with _opened(str(path), directory=ext4) as areas:
        areas.keep()
        entries = _entries(areas.areas)
        with other.open("rb") as file:
            assert "moved to other blocks" in (verify(entries, file.fileno()) or "")
    descriptor = os.open(path, os.O_RDONLY)
    set_immutable(descriptor, False)
    assert verify(entries, descriptor) is None
    run("fallocate", "--punch-hole", "-o", "8192", "-l", "4096", str(path))
    assert "lost their blocks" in (verify(entries, descriptor) or "")
    os.close(descriptor)


def test_old_readers_see_nothing_of_it(ext4: Path) -> None:
    """Space that was allocated and never written reads as zeroes through the file system, whatever lies there."""
    path = ext4 / "made"
    with _opened(str(path), directory=ext4, limit=MIB) as areas:
        assert {each.flags & extents.ExtentFlags.UNWRITTEN for each in extents.extents(areas.areas[0].fd, 0, MIB) or ()}
        assert path.read_bytes().count(0) == MIB
        areas.undo()


@pytest.mark.parametrize("exists", [True, False])
def test_what_a_helper_that_dies_has_reserved_is_given_back(ext4: Path, exists: bool) -> None:
    path = ext4 / "storage"
    if exists:
        path.write_bytes(bytes(MIB))
    reservation = Reservation(Spec(str(path)), _seat(ext4), lambda: False)
    descriptor, _ = reservation.open()
    reservation.reserve(8 * MIB, UNIT)
    assert is_immutable(path)
    helper = int(run("pgrep", "-f", "-P", str(os.getpid()), "storage.reserving"))
    os.kill(helper, signal.SIGKILL)
    reservation.undo()
    os.close(descriptor)
    reservation.close()
    assert path.exists() == exists
    if exists:
        assert not is_immutable(path)
        assert path.stat().st_size == MIB


def test_what_is_longer_than_it_was_made_stays_so(ext4: Path) -> None:
    path = ext4 / "storage"
    path.write_bytes(bytes(3 * MIB))
    assert "was made no longer than" in (_give_back(path, None, MIB, 2 * MIB) or "")
    assert path.stat().st_size == 3 * MIB
    assert _give_back(path, None, MIB, 3 * MIB) is None
    assert path.stat().st_size == MIB
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert _give_back(path, None, 0, 3 * MIB) is not None
    assert path.stat().st_size == MIB
