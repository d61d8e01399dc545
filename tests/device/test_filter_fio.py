# SPDX-License-Identifier: MIT
"""Filtered devices keep data, images keep their instant and change maps miss nothing, on disks of all shapes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from demo import blocks
from tests.direct_io import read_at, write_at
from tests.filtered import Filtered, filtered
from tests.fio import fio_verify
from tests.fio_load import fio_load
from tests.loop_devices import loop_device, run
from tests.null_block import missing_for_null_blocks, null_block

MIB = 1 << 20
SIZE = 16 * MIB
ODD_SIZE = SIZE + 3 * 512
"""Its last unit is short, and so is its last tracking block."""

MakeOrigin = Callable[[Path], AbstractContextManager[str]]

no_null_block = missing_for_null_blocks()
needs_null_block = pytest.mark.skipif(no_null_block is not None, reason=str(no_null_block))


@contextmanager
def odd_loop(folder: Path) -> Iterator[str]:
    with loop_device(folder / "origin", ODD_SIZE) as path:
        yield path


@contextmanager
def blocks_of_4096(folder: Path) -> Iterator[str]:
    with null_block(SIZE, block=4096) as path:
        yield path


@contextmanager
def four_queues(folder: Path) -> Iterator[str]:
    with null_block(SIZE, queues=4) as path:
        yield path


SHAPES = [
    pytest.param(odd_loop, 512, 1, id="odd-size"),
    pytest.param(blocks_of_4096, 4096, 1, id="4096", marks=needs_null_block),
    pytest.param(four_queues, 512, 4, id="four-queues", marks=needs_null_block),
]


def fill(path: str, size: int) -> None:
    """Something that is not zeroes, up to the last sector."""
    with Path("/dev/urandom").open("rb") as source:
        for start in range(0, size, MIB):
            write_at(path, start, source.read(min(MIB, size - start)))


def fio_mixed(disk: Filtered, least: int, queues: int, seed: int) -> None:
    """Writes (and reads) of all sizes up to 1 MiB at any offset, on a quarter of the disk, read back and verified."""
    fio_verify(
        disk.path,
        *("--rw=randrw", f"--bsrange={least}-1m", "--ioengine=libaio", "--iodepth=16", "--verify_state_save=0"),
        *((f"--numjobs={queues}", f"--offset_increment={SIZE // queues}") if queues > 1 else ()),
        size=f"{SIZE // 4 // queues}",
        seed=seed,
    )


def scattered(size: int, least: int, seed: int) -> list[tuple[int, int]]:
    """One range (start, length) in each MiB of the second half of a disk: any length up to 300 KiB, far from others."""
    dice = random.Random(seed)
    found = []
    for base in range(size // 2 // MIB * MIB, size - MIB + 1, MIB):
        start = base + dice.randrange(0, 400 << 10, least)
        found.append((start, dice.randrange(least, 300 << 10, least)))
    return found


@pytest.mark.parametrize(("make", "least", "queues"), SHAPES)
def test_data_images_and_changes(
    client: Client, folder: Path, way: str, make: MakeOrigin, least: int, queues: int
) -> None:
    with make(folder) as origin:
        with filtered(client, origin, way, folder, queues=queues) as disk:
            fill(disk.path, disk.size)
            fio_mixed(disk, least, queues, seed=1)
            copy = disk.copy()
            first = disk.snapshot(folder)
            image = first.images[0].image
            fio_mixed(disk, least, queues, seed=2)
            for start, length in scattered(disk.size, least, seed=4):
                write_at(disk.path, start, os.urandom(length))
            # The last sectors, alone: a unit that is written in part, and may be a short one.
            write_at(disk.path, disk.size - least, os.urandom(least))
            disk.expect_equal(image, copy)
            content = copy.read_bytes()
            for start, length in scattered(disk.size, least, seed=5):
                assert read_at(image, start, length) == content[start : start + length]
            preserved = client.show_snapshot(first.id).images[0].preserved_bytes
            assert 0 < preserved <= disk.size
            disk.destroy(first)
            for start, length in scattered(disk.size, least, seed=3):
                write_at(disk.path, start, os.urandom(length))
            last = disk.copy("last")
            second = disk.snapshot(folder)
            changes = disk.expect_increment(copy, first.images[0].cursor, second)
            assert changes.changed_bytes < disk.size
            disk.expect_equal(second.images[0].image, last)
        disk.expect_equal(origin, last)


@pytest.mark.quick
def test_an_image_under_heavy_writes_stays_what_it_was(client: Client, folder: Path, way: str) -> None:
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        fill(disk.path, disk.size)
        with fio_load(disk.path, "--bsrange=512-64k", size="8m") as load:
            load.wait_for_round()
            snapshot = disk.snapshot(folder)
            image = snapshot.images[0].image
            hashes = []
            for _ in range(3):
                hashes.append(blocks.sha256(image, disk.size))
                load.wait_for_round()
            assert len(set(hashes)) == 1
        assert blocks.sha256(image, disk.size) == hashes[0]
        assert blocks.sha256(disk.path, disk.size) != hashes[0]
        assert disk.state_of(snapshot) == "active"


WRITER = """
import mmap, os, sys
path, count = sys.argv[1], int(sys.argv[2])
descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
number = 0
while True:
    number += 1
    page[:8] = number.to_bytes(8, "little")
    os.pwritev(descriptor, [page], number % count * 4096)
    if number == count:
        print("all are written", flush=True)
"""


def test_an_image_is_one_instant_of_a_running_writer(client: Client, folder: Path, way: str) -> None:
    """The writer numbers its writes, each after the end of the one before: an image must end with one of them."""
    count = 1024
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder, queues=2) as disk:
        writer = subprocess.Popen(
            [sys.executable, "-S", "-c", WRITER, disk.path, str(count)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == "all are written\n"
            for _ in range(2):
                snapshot = disk.snapshot(folder)
                held = read_at(snapshot.images[0].image, 0, count * 4096)
                assert writer.poll() is None
                numbers = [int.from_bytes(held[n * 4096 : n * 4096 + 8], "little") for n in range(count)]
                last = max(numbers)
                assert sorted(numbers) == list(range(last - count + 1, last + 1))
                disk.destroy(snapshot)
        finally:
            writer.kill()
            writer.communicate()


def flushes(disk: str) -> int:
    """Flush requests that a disk has completed."""
    return int(Path(f"/sys/block/{Path(disk).name}/stat").read_text().split()[15])


def sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def test_flush_and_fua_reach_the_origin(client: Client, folder: Path, way: str) -> None:
    """A synchronous write is a FUA write and a flush after it; the loop device turns FUA into a flush of its own."""
    with loop_device(folder / "origin", SIZE) as origin, filtered(client, origin, way, folder) as disk:
        for held in (False, True):
            if held:
                disk.snapshot(folder)
            before = flushes(origin)
            write_at(disk.path, 4096, os.urandom(4096))
            assert flushes(origin) == before
            sync(disk.path)
            after_flush = flushes(origin)
            assert after_flush > before
            write_at(disk.path, 4096, os.urandom(4096), os.O_DSYNC)
            assert flushes(origin) - after_flush > after_flush - before


@pytest.mark.parametrize("least", [512, 4096])
def test_discards_and_zeroes(client: Client, folder: Path, way: str, least: int) -> None:
    """Ranges that neither begin nor end with a unit; the origin is written, the image is not."""
    options = ["--sector-size", str(least)]
    with loop_device(folder / "origin", SIZE, options) as origin, filtered(client, origin, way, folder) as disk:
        fill(disk.path, disk.size)
        copy = disk.copy()
        first = disk.snapshot(folder)
        start, length = 3 * MIB + least, 3 * MIB + 3 * least
        zeroes = bytes(length)
        run("blkdiscard", "--zeroout", "--offset", str(start), "--length", str(length), disk.path)
        assert read_at(disk.path, start, length) == zeroes
        assert read_at(disk.path, start - least, least) == copy.read_bytes()[start - least : start]
        discards = int(Path(f"/sys/block/{Path(disk.path).name}/queue/discard_max_bytes").read_text())
        if discards:
            for offset in (8 * MIB, 12 * MIB + least):
                run("blkdiscard", "--offset", str(offset), "--length", str(2 * MIB), disk.path)
        write_at(disk.path, 9 * MIB, os.urandom(2 * MIB))
        disk.expect_equal(first.images[0].image, copy)
        disk.destroy(first)
        # What was discarded under the first snapshot is discarded by now, or will be; the increment holds either.
        second = disk.snapshot(folder)
        disk.expect_increment(copy, first.images[0].cursor, second)
        disk.expect_equal(second.images[0].image, copy)
