# SPDX-License-Identifier: MIT
"""Targets on real ublk devices, on both data ways: data, file systems, discards, flushes, limits."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk import ublk
from blksnap_ublk.ublk.features import ZERO_COPY
from tests.fio import fio_verify
from tests.loop_devices import loop_device, mounted, run

MIB = 1 << 20
SIZE = 48 * MIB
GRANTED = ublk.granted_features() or ublk.Features(0)
WAYS = [
    "copy",
    pytest.param(
        "zero-copy", marks=pytest.mark.skipif(ZERO_COPY not in GRANTED, reason="this kernel grants no zero copy")
    ),
]

both_ways = pytest.mark.parametrize("way", WAYS)


class Memory(ublk.PyTarget):
    """A RAM disk that keeps a list of its flushes, discards and zeroed ranges."""

    def __init__(self, size: int = SIZE) -> None:
        self.size, self.data = size, bytearray(size)
        self.calls: list[str] = []

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset: int, buf: memoryview) -> None:
        self.calls.append("write")
        self.data[offset : offset + len(buf)] = buf

    def flush(self) -> None:
        self.calls.append("flush")

    def discard(self, offset: int, length: int) -> None:
        self.calls.append("discard")
        self.data[offset : offset + length] = b"D" * length

    def write_zeroes(self, offset: int, length: int) -> None:
        self.calls.append("write_zeroes")
        self.data[offset : offset + length] = bytes(length)


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    before = ublk.device_ids()
    yield
    assert ublk.device_ids() == before
    assert not list(Path("/dev").glob("ublk[bc]*"))


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    """A directory on an ext4 of its own, where direct I/O, punching holes and zeroing ranges work."""
    with loop_device(tmp_path / "base", 512 * MIB) as base, mounted(base, tmp_path / "files") as directory:
        yield directory


@pytest.fixture
def image(files: Path) -> Path:
    path = files / "disk.img"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    return path


def in_other_process(script: str, *arguments: str) -> str:
    """Whoever serves a device does not open it: what a test does to one, another process does."""
    return run(sys.executable, "-S", "-c", f"import os, sys, mmap\n{script}", *arguments)


def queue_attribute(device: ublk.Device, name: str) -> str:
    return Path(f"/sys/block/ublkb{device.id}/queue/{name}").read_text().strip()


@both_ways
@pytest.mark.quick
def test_null_reads_and_writes(way: str) -> None:
    with ublk.Device.add(ublk.Null(1 << 30), queues=2, data_path=way) as device:
        assert device.data_path == way
        run("fio", "--name=n", f"--filename={device.path}", "--rw=randrw", "--direct=1", "--bs=4k", "--size=4m")


@both_ways
@pytest.mark.quick
def test_loop_on_a_file_keeps_data(way: str, image: Path) -> None:
    with ublk.Device.add(ublk.Loop(image), queues=2, data_path=way) as device:
        assert device.data_path == way
        fio_verify(device.path, "--iodepth=16", "--ioengine=libaio")


@both_ways
@pytest.mark.parametrize("block", [512, 4096])
def test_loop_on_a_block_device_keeps_data(way: str, block: int, files: Path) -> None:
    options = ["--sector-size", str(block), "--direct-io=on"]
    with (
        loop_device(files / "origin", SIZE, options) as origin,
        ublk.Device.add(ublk.Loop(origin), data_path=way) as device,
    ):
        assert queue_attribute(device, "logical_block_size") == str(block)
        fio_verify(device.path, "--numjobs=2", "--offset_increment=24m", size="20m")
        with pytest.raises(OSError, match="in use by process"):
            ublk.Loop(origin)


@pytest.mark.quick
def test_a_python_target_keeps_data() -> None:
    with ublk.Device.add(Memory(), queues=2) as device:
        assert device.data_path == "copy"
        fio_verify(device.path)


@both_ways
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_file_systems(way: str, kind: str, files: Path, tmp_path: Path) -> None:
    path = files / "fs.img"
    with path.open("wb") as file:
        file.truncate(320 * MIB)
    content = os.urandom(3 * MIB)
    with ublk.Device.add(ublk.Loop(path), data_path=way) as device:
        with mounted(device.path, tmp_path / "mnt", kind) as top:
            (top / "data").write_bytes(content)
            (top / "gone").write_bytes(content)
            (top / "gone").unlink()
            run("fstrim", str(top))
        run(*(("xfs_repair", "-n") if kind == "xfs" else ("fsck.ext4", "-fn")), device.path)
    with loop_device(path) as again:
        (tmp_path / "again").mkdir()
        run("mount", "-o", "ro", again, str(tmp_path / "again"))
        try:
            assert (tmp_path / "again" / "data").read_bytes() == content
        finally:
            run("umount", str(tmp_path / "again"))


@both_ways
def test_discard_frees_and_zeroing_keeps_the_space_of_a_file(way: str, image: Path) -> None:
    image.write_bytes(b"x" * SIZE)
    os.sync()
    full = image.stat().st_blocks
    with ublk.Device.add(ublk.Loop(image), data_path=way) as device:
        run("blkdiscard", "--zeroout", "--offset", str(4 * MIB), "--length", str(4 * MIB), device.path)
        assert image.stat().st_blocks >= full - 16
        run("blkdiscard", "--offset", str(16 * MIB), "--length", str(8 * MIB), device.path)
        assert image.stat().st_blocks <= full - 8 * MIB // 512 + 16
    data = image.read_bytes()
    assert data[: 4 * MIB] == b"x" * (4 * MIB)
    assert data[4 * MIB : 8 * MIB] == bytes(4 * MIB)
    assert data[8 * MIB : 16 * MIB] == b"x" * (8 * MIB)
    assert data[16 * MIB : 24 * MIB] == bytes(8 * MIB)
    assert data[24 * MIB :] == b"x" * (24 * MIB)


def test_a_python_target_gets_discards_zeroes_and_flushes() -> None:
    memory = Memory()
    with ublk.Device.add(memory) as device:
        memory.calls.clear()
        run("blkdiscard", "--length", str(MIB), device.path)
        run("blkdiscard", "--zeroout", "--offset", str(MIB), "--length", str(MIB), device.path)
        assert memory.data[:MIB] == b"D" * MIB
        assert {"discard", "write_zeroes"} <= set(memory.calls)
        memory.calls.clear()
        in_other_process(
            "fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT | os.O_DSYNC); page = mmap.mmap(-1, 4096)\n"
            "os.pwrite(fd, page, 8192)",
            device.path,
        )
        assert memory.calls[:2] == ["write", "flush"]


def test_what_a_python_target_lacks_is_not_offered() -> None:
    class Reader(ublk.PyTarget):
        size = MIB
        block = 4096

        def read(self, offset: int, buf: memoryview) -> None:
            buf[:] = b"r" * len(buf)

    class Writer(Reader):
        def write(self, offset: int, buf: memoryview) -> None: ...

    with ublk.Device.add(Reader()) as device:
        assert run("blockdev", "--getro", device.path) == "1"
    with ublk.Device.add(Writer()) as device:
        assert queue_attribute(device, "write_cache") == "write through"
        assert queue_attribute(device, "discard_max_bytes") == "0"
        assert queue_attribute(device, "write_zeroes_max_bytes") == "0"
        assert queue_attribute(device, "logical_block_size") == "4096"


@both_ways
def test_attributes_of_loop(way: str, image: Path) -> None:
    with ublk.Device.add(ublk.Loop(image), data_path=way) as device:
        assert queue_attribute(device, "write_cache") == "write back"
        assert queue_attribute(device, "fua") == "1"
        assert int(queue_attribute(device, "discard_max_bytes")) > 0
        assert int(queue_attribute(device, "write_zeroes_max_bytes")) >= 512 << 10
        assert "[none]" in queue_attribute(device, "scheduler")
        assert int(run("blockdev", "--getsize64", device.path)) == SIZE


def test_a_read_only_loop(image: Path) -> None:
    with ublk.Device.add(ublk.Loop(image, read_only=True)) as device:
        assert run("blockdev", "--getro", device.path) == "1"
        run("dd", f"if={device.path}", "of=/dev/null", "bs=1M", "iflag=direct")


def test_an_exception_of_a_python_target_is_eio_and_the_device_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Memory):
        def read(self, offset: int, buf: memoryview) -> None:
            if offset <= 8 * MIB < offset + len(buf):
                raise ValueError("a bug in the target")
            super().read(offset, buf)

    with ublk.Device.add(Broken()) as device:
        command = ["dd", f"if={device.path}", "of=/dev/null", "bs=64k", "skip=128", "count=1", "iflag=direct"]
        failed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert failed.returncode != 0
        assert "Input/output error" in failed.stderr
        run("dd", f"if={device.path}", "of=/dev/null", "bs=64k", "count=16", "iflag=direct")
    assert "a bug in the target" in caplog.text


def test_two_devices_at_once(image: Path) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(ublk.Device.add(ublk.Loop(image)))
        second = stack.enter_context(ublk.Device.add(Memory()))
        assert first.path != second.path
        run("dd", f"if={first.path}", f"of={second.path}", "bs=1M", "oflag=direct")


def test_the_same_file_twice_is_refused(image: Path) -> None:
    with ublk.Device.add(ublk.Loop(image)), pytest.raises(OSError, match="locked by another"):
        ublk.Loop(image)


def test_partitions_are_found_unless_told_otherwise(files: Path) -> None:
    path = files / "partitioned.img"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["sfdisk", "-q", path], input="label: dos\nstart=2048, size=4096\n", text=True, check=True)
    with ublk.Device.add(ublk.Loop(path)) as device:
        node = Path(device.path + "p1")
        for _ in range(100):
            if node.exists():
                break
            time.sleep(0.05)
        assert node.exists()
    if ublk.Features.NO_AUTO_PART_SCAN in GRANTED:
        with ublk.Device.add(ublk.Loop(path), part_scan=False) as device:
            time.sleep(0.3)
            assert not Path(device.path + "p1").exists()
