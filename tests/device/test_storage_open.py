# SPDX-License-Identifier: MIT
"""Block devices as difference storage: claims, stacks, partitions, and files on file systems above them."""

import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from blksnap_ublk.errors import Busy, Failed, NotFound, Unsupported, UsageError
from blksnap_ublk.host import blockdev
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.spec import parse_spec
from blksnap_ublk.snapshot.storage import AreaKind, DescriptorRegistry, OpenAreas, UsedRange, open_storage
from tests.loop_devices import loop_device, mapped, missing_for_loops, mounted, partitioned

MIB = 1 << 20
SIZE = 32 * MIB

MakeDisk = Callable[..., str]
Open = Callable[..., OpenAreas]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    missing = missing_for_loops()
    if missing:
        pytest.skip(f"loop devices: {missing}")
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def directory(tmp_path: Path, stack: ExitStack) -> Path:
    """A directory on ext4 of its own, so that loop devices on its files have a stack that can be followed."""
    base = stack.enter_context(loop_device(tmp_path / "base", 256 * MIB))
    return stack.enter_context(mounted(base, tmp_path / "files"))


@pytest.fixture
def disk(directory: Path, stack: ExitStack) -> MakeDisk:
    """Makes loop devices of 32 MiB: `disk(name, *losetup options)`."""
    return lambda name="disk", *options: stack.enter_context(loop_device(directory / name, SIZE, options))


@pytest.fixture
def registry() -> Iterator[DescriptorRegistry]:
    registry = DescriptorRegistry()
    yield registry
    assert registry.held() == frozenset()


@pytest.fixture
def opened(registry: DescriptorRegistry) -> Open:
    def open_them(
        *texts: str, off_limits: Sequence[str] = (), used: Sequence[UsedRange] = (), limit: int | None = None
    ) -> OpenAreas:
        numbers = {blockdev.device_number(path) for path in off_limits}
        specs = [parse_spec(text) for text in texts]
        return open_storage(specs, registry=registry, off_limits=numbers, used=used, limit=limit, needed=SIZE)

    return open_them


def test_a_whole_device(disk: MakeDisk, opened: Open) -> None:
    path = disk()
    with opened(path) as areas, mmap.mmap(-1, 4096) as page:
        (area,) = areas.areas
        assert (area.kind, area.start_byte, area.length) == (AreaKind.DEVICE, 0, SIZE)
        assert (area.direct, area.written, area.filesystem) == (True, True, None)
        assert area.device == blockdev.device_number(path)
        assert areas.notes == ()
        page.write(b"a" * 4096)
        assert os.pwrite(area.fd, page, area.length - 4096) == 4096


def test_ranges_of_several_specs_share_one_claim(disk: MakeDisk, opened: Open, tmp_path: Path) -> None:
    path = disk()
    link = tmp_path / "link"
    link.symlink_to(path)
    with opened(f"{path}:0+1024,8192+1024", f"{link}:2048+1024") as areas:
        assert len({area.fd for area in areas.areas}) == 1
        starts = [area.start_byte // 512 for area in areas.areas]
        assert starts == [0, 8192, 2048]
        with opened(f"{path}:4096+1024", used=[area.used_range for area in areas.areas]) as more:
            assert more.areas[0].fd == areas.areas[0].fd
        with pytest.raises(Busy, match="another snapshot"):
            opened(f"{path}:2040+16", used=[area.used_range for area in areas.areas])
    with pytest.raises(UsageError, match=r"sectors 8\+16 overlap 0\+16"):
        opened(f"{path}:0+16", f"{link}:8+16")


def test_ranges_beyond_the_device_are_refused(disk: MakeDisk, opened: Open) -> None:
    with pytest.raises(UsageError, match=r"outside of the device, which has 65536 sectors"):
        opened(f"{disk()}:65535+2")


def test_blocks_larger_than_a_unit_are_refused(disk: MakeDisk, registry: DescriptorRegistry) -> None:
    spec = parse_spec(disk("disk", "--sector-size", "4096"))
    with pytest.raises(Unsupported, match="logical blocks of 4096"):
        open_storage([spec], registry=registry, off_limits=[], needed=SIZE, unit=512)


def test_a_claimed_device_is_busy_and_a_failure_releases_the_others(
    disk: MakeDisk, opened: Open, stack: ExitStack, tmp_path: Path
) -> None:
    free, taken = disk("free"), disk("taken")
    point = stack.enter_context(mounted(taken, tmp_path / "mnt"))
    with pytest.raises(Busy, match=f"{taken}: in use by mount {point} "):
        opened(free, taken)
    descriptor = os.open(free, os.O_RDWR | os.O_EXCL)
    os.close(descriptor)


def test_a_disk_and_its_partition_exclude_each_other(directory: Path, stack: ExitStack, opened: Open) -> None:
    image = partitioned(directory / "parted", SIZE, [(2048, 8192), (16384, 8192)])
    path = stack.enter_context(loop_device(image, None, ["--partscan"]))
    if not Path(path + "p1").exists():
        pytest.skip("this kernel makes no partitions of loop devices")
    with pytest.raises(Busy):
        opened(path, path + "p1")
    with opened(path + "p1", path + "p2") as areas:
        assert [area.length for area in areas.areas] == [8192 * 512] * 2
    with pytest.raises(Unsupported, match=f"{path}p1: lies on {path}, "):
        opened(path + "p1", off_limits=[path])
    opened(path + "p2", off_limits=[path + "p1"]).close()


def test_read_only_and_missing_devices_are_refused(disk: MakeDisk, opened: Open) -> None:
    with pytest.raises(Failed, match="read-only"):
        opened(disk("disk", "--read-only"))
    with pytest.raises((UsageError, NotFound), match="/dev/no-such-device"):
        opened("/dev/no-such-device")


def test_a_snapshotted_device_is_no_storage(disk: MakeDisk, opened: Open) -> None:
    path = disk()
    with pytest.raises(Unsupported, match=f"{path}: lies on {path}, and storage on the snapshotted device itself"):
        opened(path, off_limits=[path])


def test_nor_is_a_file_on_it_or_on_what_rests_on_it(
    disk: MakeDisk, opened: Open, stack: ExitStack, tmp_path: Path
) -> None:
    origin = disk("origin")
    point = stack.enter_context(mounted(origin, tmp_path / "mnt"))
    with (point / "image").open("wb") as image, (point / "file").open("wb") as file:
        image.truncate(16 * MIB)
        file.truncate(2 * MIB)
    above = stack.enter_context(loop_device(point / "image"))
    for text in (above, str(point / "file"), str(point)):
        with pytest.raises(Unsupported, match=f"lies on {origin}, "):
            opened(text, off_limits=[origin], limit=MIB)
    nested = stack.enter_context(mounted(above, tmp_path / "nested"))
    with pytest.raises(Unsupported, match=f"lies on {origin}, "):
        opened(str(nested), off_limits=[origin], limit=MIB)
    with (nested / "image").open("wb") as file:
        file.truncate(2 * MIB)
    third = stack.enter_context(loop_device(nested / "image"))
    with pytest.raises(Unsupported, match=f"lies on {origin}, "):
        opened(third, off_limits=[origin])
    opened(third).close()
    opened(str(nested), limit=MIB).close()


def test_nor_is_a_dm_device_above_it(disk: MakeDisk, opened: Open, stack: ExitStack) -> None:
    if not shutil.which("dmsetup"):
        pytest.skip("no dmsetup")
    origin = disk("origin")
    try:
        above = stack.enter_context(mapped(f"bsu-storage-{os.getpid()}", f"0 32768 linear {origin} 0"))
    except AssertionError as error:
        pytest.skip(f"no device-mapper here: {error}")
    with pytest.raises(Unsupported, match=f"{above}: lies on {origin}, "):
        opened(above, off_limits=[origin])
    with opened(above) as areas:
        assert areas.areas[0].length == 32768 * 512
    with pytest.raises(Busy, match=f"device {above}"):
        opened(origin)


def test_a_file_on_another_device_is_storage(disk: MakeDisk, opened: Open, stack: ExitStack, tmp_path: Path) -> None:
    origin, other = disk("origin"), disk("other")
    point = stack.enter_context(mounted(other, tmp_path / "mnt"))
    with opened(str(point), limit=8 * MIB, off_limits=[origin]) as areas:
        assert (areas.areas[0].kind, areas.areas[0].length) == (AreaKind.UNNAMED, 8 * MIB)
        assert areas.areas[0].device == blockdev.device_number(other)


def test_a_ram_disk(opened: Open) -> None:
    path = "/dev/ram0"
    if not os.path.exists(path):
        pytest.skip("no RAM disk (brd.rd_nr=1)")
    with opened(path) as areas:
        assert areas.areas[0].length == blockdev.describe(path).size
        assert areas.areas[0].device == DeviceNumber(1, 0)
