# SPDX-License-Identifier: MIT
"""Whoever writes to a file system between two looks at its device is seen; whoever reads is not."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from blksnap_ublk.host import write_evidence
from blksnap_ublk.host.blockdev import device_number
from blksnap_ublk.host.write_evidence import Evidence
from tests.loop_devices import run
from tests.unit.host.conftest import Disks

MIB = 1 << 20
SIZES = {"mkfs.xfs": 320 * MIB, "mkfs.btrfs": 128 * MIB}
"""The least that they take."""
MKFS = {
    "ext4": ("mkfs.ext4", "-qF"),
    "ext4 without journal": ("mkfs.ext4", "-qF", "-O", "^has_journal"),
    "ext4, 1 KiB blocks": ("mkfs.ext4", "-qF", "-b", "1024"),
    "ext3": ("mkfs.ext3", "-qF"),
    "ext2": ("mkfs.ext2", "-qF"),
    "xfs": ("mkfs.xfs", "-qf"),
    "xfs, 1 KiB blocks": ("mkfs.xfs", "-qf", "-b", "size=1k"),
    "btrfs": ("mkfs.btrfs", "-qf"),
}


@pytest.fixture(params=MKFS)
def device(request: pytest.FixtureRequest, disks: Disks) -> str:
    """A file system that was never mounted."""
    command = MKFS[request.param]
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]}")
    path = disks.disk("disk", SIZES.get(command[0], 16 * MIB))
    run(*command, path)
    return path


@pytest.fixture
def ext4(disks: Disks) -> str:
    path = disks.disk("disk", 32 * MIB)
    run(*MKFS["ext4"], path)
    return path


def look(device: str, *, count: bool = False) -> Evidence:
    """As the file system alone shows it, as after a reboot; or with what the kernel has counted."""
    descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_EXCL)
    try:
        found = write_evidence.read(descriptor, device_number(device))
    finally:
        os.close(descriptor)
    return found if count else msgspec.structs.replace(found, counters=None)


def digest(device: str) -> str:
    """Of all that it holds."""
    with open(device, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


@contextmanager
def mounted(device: str, at: Path, options: str = "rw") -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", options, device, str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot be mounted here: {done.stderr}")
    try:
        yield at
    finally:
        run("umount", str(at))


def test_nobody_has_written(device: str) -> None:
    before = look(device, count=True)
    assert before.digest is not None, before.objection
    assert write_evidence.refutation(before, look(device, count=True)) is None


@pytest.mark.parametrize("write", [False, True])
def test_mounted_for_writing(device: str, tmp_path: Path, write: bool) -> None:
    """Seen from the first mount on, whether anything was written to a file or not."""
    for _ in range(2):
        before = look(device)
        content = digest(device)
        with mounted(device, tmp_path / "mounted") as directory:
            if write:
                (directory / "file").write_bytes(b"x")
        after = look(device)
        assert after.digest is not None, after.objection
        if not write and digest(device) == content:
            pytest.skip("it writes nothing at all then")
        assert write_evidence.refutation(before, after) is not None


def test_mounted_for_reading(device: str, tmp_path: Path) -> None:
    """The kernel may write then, to the log; what it does is seen, and nothing else is."""
    with mounted(device, tmp_path / "mounted") as directory:
        (directory / "file").write_bytes(b"x")
    before = look(device)
    content = digest(device)
    with mounted(device, tmp_path / "mounted", "ro") as directory:
        (directory / "file").read_bytes()
    unchanged = digest(device) == content
    assert (write_evidence.refutation(before, look(device)) is None) == unchanged


def test_in_use_is_no_evidence(device: str, tmp_path: Path, disks: Disks) -> None:
    """What a mounted file system shows, or one whose machine has crashed, is not relied upon."""
    copy = tmp_path / "copy"
    with mounted(device, tmp_path / "mounted") as directory:
        (directory / "file").write_bytes(b"x" * MIB)
        descriptor = os.open(directory / "file", os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
        copy.write_bytes(Path(device).read_bytes())
    found = look(disks.existing(copy))
    assert found.digest is None
    assert "cleanly" in str(found.objection)
    assert write_evidence.refutation(found, found) is not None


TOOLS = [("e2fsck", "-fy"), ("tune2fs", "-L", "other"), ("tune2fs", "-c", "7"), ("debugfs", "-w", "-R", "mkdir x")]


@pytest.mark.parametrize("tool", TOOLS, ids=" ".join)
def test_tools_of_ext4(ext4: str, tool: tuple[str, ...]) -> None:
    before = look(ext4)
    time.sleep(1.1)  # what they leave are whole seconds; between a detach and the next boot there are more
    subprocess.run([*tool, ext4], capture_output=True)
    assert write_evidence.refutation(before, look(ext4)) is not None


def test_looking_with_tools_of_ext4(ext4: str) -> None:
    before = look(ext4, count=True)
    for tool in (("e2fsck", "-fn"), ("dumpe2fs", "-h"), ("blkid", "-p")):
        subprocess.run([*tool, ext4], capture_output=True)
    assert write_evidence.refutation(before, look(ext4, count=True)) is None


@pytest.mark.parametrize("tool", [("xfs_repair",), ("xfs_admin", "-L", "other"), ("xfs_repair", "-L")], ids=" ".join)
def test_tools_of_xfs(disks: Disks, tmp_path: Path, tool: tuple[str, ...]) -> None:
    if not shutil.which(tool[0]):
        pytest.skip(f"no {tool[0]}")
    device = disks.disk("disk", SIZES["mkfs.xfs"])
    run(*MKFS["xfs"], device)
    with mounted(device, tmp_path / "mounted") as directory:
        (directory / "file").write_bytes(b"x")
    before = look(device)
    run(*tool, device)
    assert write_evidence.refutation(before, look(device)) is not None


def write(device: str) -> None:
    with open(device, "r+b", buffering=0) as file:
        file.seek(20 * MIB + 4096)
        file.write(b"x" * 4096)
        os.fsync(file.fileno())


def discard(device: str) -> None:
    run("blkdiscard", "--offset", str(20 * MIB), "--length", "65536", device)


@pytest.mark.parametrize("meddle", [write, discard])
def test_raw_writes_within_a_boot(ext4: str, meddle: Callable[[str], None]) -> None:
    """The file system shows nothing of them; the kernel has counted them."""
    before = look(ext4, count=True)
    meddle(ext4)
    after = look(ext4, count=True)
    assert write_evidence.refutation(before, after) is not None
    assert before.digest == after.digest
    assert before.counters is not None
    other_boot = msgspec.structs.replace(before.counters, boot="another")
    assert write_evidence.refutation(msgspec.structs.replace(before, counters=other_boot), after) is None


def swap(device: str) -> None:
    run("mkswap", device)


def lvm(device: str) -> None:
    put(device, 512, b"LABELONE")


def raid(device: str) -> None:
    put(device, 4096, struct.pack("<I", 0xA92B4EFC))


def raid_at_the_end(device: str) -> None:
    put(device, (32 * MIB // 512 - 16) * 512, struct.pack("<I", 0xA92B4EFC))


def luks(device: str) -> None:
    put(device, 0, b"LUKS\xba\xbe\0\2")


def old_partitions(device: str) -> None:
    put(device, 446, struct.pack("<8B2I", 0, 0, 0, 0, 0x83, 0, 0, 0, 2048, 4096))
    put(device, 510, b"\x55\xaa")


def gpt(device: str) -> None:
    put(device, 512, b"EFI PART")


def zfs(device: str) -> None:
    put(device, (128 << 10) + 7 * 1024, struct.pack("<Q", 0x00BAB10C))


def put(device: str, at: int, data: bytes) -> None:
    with open(device, "r+b", buffering=0) as file:
        file.seek(at // 4096 * 4096)
        page = bytearray(file.read(4096))
        page[at % 4096 : at % 4096 + len(data)] = data
        file.seek(at // 4096 * 4096)
        file.write(page)
        os.fsync(file.fileno())


@pytest.mark.parametrize("use", [swap, lvm, raid, raid_at_the_end, luks, old_partitions, gpt, zfs])
def test_forgotten_file_system_is_no_evidence(ext4: str, use: Callable[[str], None]) -> None:
    """A device that has become a part of something else may keep the superblock that it had."""
    assert look(ext4).digest is not None
    use(ext4)
    found = look(ext4)
    assert found.digest is None
    assert found.objection


def test_nothing_there(disks: Disks) -> None:
    for size in (4096, 64 << 10, 16 * MIB):
        found = look(disks.disk(f"disk-{size}", size))
        assert found.digest is None
        assert found.objection


def test_garbage_in_the_superblock(disks: Disks) -> None:
    """Whatever numbers it holds: an answer, or no evidence, but no crash."""
    for name, magic, at in (("ext", b"\x53\xef", 1024 + 0x38), ("xfs", b"XFSB", 0), ("btrfs", b"_BHRfS_M", 65600)):
        path = disks.disk(name, 16 * MIB)
        for fill in (b"\xff", b"\x7f", b"\x01"):
            with open(path, "r+b", buffering=0) as file:
                file.write(fill * (128 << 10))
            put(path, at, magic)
            put(path, 510, b"\0\0")
            look(path)
