# SPDX-License-Identifier: MIT
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.host import extents
from tests.unit.host.conftest import Disks

BLOCK = 64 << 10


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8), st.integers(0, 40), st.integers(1, 40))
def test_gaps_are_what_no_run_covers(runs: list[tuple[int, int]], start: int, length: int) -> None:
    covered = {byte for begin, size in runs for byte in range(begin, begin + size)}
    missing = [byte for begin, size in extents.gaps(runs, start, length) for byte in range(begin, begin + size)]
    assert missing == [byte for byte in range(start, start + length) if byte not in covered]


def _checkerboard(path: Path, blocks: int) -> int:
    """Every second block written, the rest holes, a hole at the end."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    for block in range(0, blocks, 2):
        os.pwrite(descriptor, b"d" * BLOCK, block * BLOCK)
    os.ftruncate(descriptor, blocks * BLOCK)
    return descriptor


@pytest.mark.parametrize("blocks", [2, 6, 1100])  # 1100: more extents than one FIEMAP call returns
def test_holes_of_a_file_on_ext4(disks: Disks, blocks: int) -> None:
    point = disks.mounted(disks.disk("disk", 96 << 20))
    descriptor = _checkerboard(point / "file", blocks)
    try:
        mapped = extents.extents(descriptor, 0, blocks * BLOCK)
        assert mapped is not None
        assert sum(each.length for each in mapped) == (blocks + 1) // 2 * BLOCK
        found = extents.holes(descriptor, 0, blocks * BLOCK)
        assert found == [(block * BLOCK, BLOCK) for block in range(1, blocks, 2)]
        assert extents.holes(descriptor, BLOCK + 4096, 8192) == [(BLOCK + 4096, 8192)]
        assert extents.holes(descriptor, 0, 4096) == []
        os.posix_fallocate(descriptor, 0, blocks * BLOCK)
        assert extents.holes(descriptor, 0, blocks * BLOCK) == []
    finally:
        os.close(descriptor)


def test_holes_of_a_file_on_tmpfs() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    descriptor = _checkerboard(Path(f"/dev/shm/bsu-test-{os.getpid()}"), 6)
    try:
        os.unlink(f"/dev/shm/bsu-test-{os.getpid()}")
        assert extents.holes(descriptor, 0, 6 * BLOCK) == [(block * BLOCK, BLOCK) for block in (1, 3, 5)]
        beyond = extents.holes(descriptor, 4 * BLOCK, 4 * BLOCK)
        assert extents.gaps(beyond, 4 * BLOCK, 4 * BLOCK) == [(4 * BLOCK, BLOCK)]
    finally:
        os.close(descriptor)
