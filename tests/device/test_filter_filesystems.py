# SPDX-License-Identifier: MIT
"""File systems on filtered devices and in images: made, mounted, used while a snapshot is held, checked."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from demo import blocks
from tests.filtered import filtered
from tests.loop_devices import loop_device, mounted, run
from tests.null_block import missing_for_null_blocks, null_block

MIB = 1 << 20
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
"""The smallest that mkfs makes without complaint."""

no_null_block = missing_for_null_blocks()
kinds = pytest.mark.parametrize("kind", ["ext4", "xfs"])


def check(kind: str, device: str) -> None:
    """The file system check finds nothing wrong with what is not mounted."""
    run(*(("xfs_repair", "-n") if kind == "xfs" else ("e2fsck", "-fn")), device)


def write_files(top: Path, seed: int) -> dict[str, str]:
    """Files of several sizes, one deleted, one renamed, one that is overwritten in its middle; their checksums."""
    folder = top / f"files{seed}"
    folder.mkdir()
    for number, size in enumerate((0, 1, 4095, 70_000, 900_000, 3_000_000)):
        (folder / f"file{number}").write_bytes(os.urandom(size))
    (folder / "file2").unlink()
    (folder / "file3").rename(folder / "renamed")
    with (folder / "file5").open("r+b") as file:
        file.seek(1_000_001)
        file.write(os.urandom(200_000))
    return checksums(folder)


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@contextmanager
def mounted_as_it_is(device: str, point: Path, *options: str) -> Iterator[Path]:
    """What is there already, mounted."""
    point.mkdir(exist_ok=True)
    run("mount", *options, device, str(point))
    try:
        yield point
    finally:
        run("umount", str(point))


def check_image(kind: str, image: str, folder: Path, files: dict[str, str]) -> None:
    """The image holds these files, when it is mounted as it is and, brought up as after a crash, as a copy."""
    options = "ro,nouuid,norecovery" if kind == "xfs" else "ro,noload"
    with mounted_as_it_is(image, folder / "image", "-o", options) as top:
        assert checksums(top / "files1") == files
        assert not (top / "files2").exists()
    size = SIZES[kind]
    copy = folder / "image-copy"
    blocks.full_copy(image, size, copy)
    with loop_device(copy) as device:
        with mounted_as_it_is(device, folder / "image", *(("-o", "nouuid") if kind == "xfs" else ())) as top:
            assert checksums(top / "files1") == files
        check(kind, device)
    copy.unlink()


@kinds
def test_made_used_snapshotted_and_checked(client: Client, folder: Path, way: str, kind: str) -> None:
    if not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"no mkfs.{kind}")
    point = folder / "data"
    with loop_device(folder / "origin", SIZES[kind]) as origin:
        with filtered(client, origin, way, folder) as disk:
            with mounted(disk.path, point, kind) as top:
                first_files = write_files(top, 1)
                snapshot = disk.snapshot(folder)
                assert snapshot.frozen
                image = snapshot.images[0].image
                second_files = write_files(top, 2)
                run("fstrim", str(top))
                shutil.rmtree(top / "files1")
                run("sync", "-f", str(top))
                check_image(kind, image, folder, first_files)
                disk.destroy(snapshot)
                run("fstrim", str(top))
                assert checksums(top / "files2") == second_files
            check(kind, disk.path)
        check(kind, origin)
        with mounted_as_it_is(origin, point) as top:
            assert checksums(top / "files2") == second_files
            assert not (top / "files1").exists()


@kinds
@pytest.mark.skipif(no_null_block is not None, reason=str(no_null_block))
def test_on_blocks_of_4096(client: Client, folder: Path, way: str, kind: str) -> None:
    if not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"no mkfs.{kind}")
    with null_block(SIZES[kind], block=4096) as origin:
        with filtered(client, origin, way, folder) as disk:
            with mounted(disk.path, folder / "data", kind) as top:
                first_files = write_files(top, 1)
                snapshot = disk.snapshot(folder)
                second_files = write_files(top, 2)
                run("fstrim", str(top))
                run("sync", "-f", str(top))
            options = "ro,nouuid,norecovery" if kind == "xfs" else "ro,noload"
            with mounted_as_it_is(snapshot.images[0].image, folder / "image", "-o", options) as top:
                assert checksums(top / "files1") == first_files
                assert not (top / "files2").exists()
            check(kind, disk.path)
        with mounted_as_it_is(origin, folder / "data") as top:
            assert checksums(top / "files2") == second_files
