# SPDX-License-Identifier: MIT
"""What I/O goes to: properties of files and block devices, and the commands of the latter."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import FileInfo, Flags
from tests.loop_devices import loop_device, missing_for_loops
from tests.unit.engine.disks import errno_of, make_file, memory, pattern, read_all

SIZE = 8 << 20


def test_properties_of_a_file(folder: Path) -> None:
    with make_file(folder / "buffered", 12345, seed=1, direct=False) as file:
        assert file.info == FileInfo(12345, 512, is_device=False, direct=False)
        os.truncate(folder / "buffered", 54321)
        assert file.info.size == 54321
    with make_file(folder / "direct", SIZE) as file:
        info = file.info
        assert (info.size, info.is_device, info.direct) == (SIZE, False, True)
        assert info.block in (512, 1024, 2048, 4096)


def test_other_kinds_of_files_are_refused(folder: Path) -> None:
    reader, writer = os.pipe()
    directory = os.open(folder, os.O_RDONLY)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (reader, writer, directory, null):
        with pytest.raises(OSError, match="descriptor") as caught:
            engine.File(fd)
        assert caught.value.errno == errno.EINVAL
        os.close(fd)


@pytest.mark.skipif(bool(missing_for_loops()), reason=f"loop devices: {missing_for_loops()}")
def test_a_block_device(folder: Path, thread: engine.Thread) -> None:
    """Discard is a command of io_uring's since Linux 6.12; before, it is refused as not supported."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    model = bytearray(pattern(seed, SIZE))
    backing = folder / "disk"
    backing.write_bytes(model)
    with loop_device(backing) as path:
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC)
        with engine.File(fd) as file, engine.Device(size=SIZE, origin=file) as device:
            os.close(fd)
            assert file.info == FileInfo(SIZE, 512, is_device=True, direct=True)
            with engine.LocalQueue(thread, device=device) as queue:
                assert read_all(queue, SIZE) == model
                buffer = memory(65536)
                buffer[:] = random.Random(seed).randbytes(65536)
                queue.write(4096, buffer, Flags.FUA)
                model[4096 : 4096 + 65536] = buffer[:]
                queue.flush()
                queue.write_zeroes(1 << 20, 1 << 20)
                queue.write_zeroes(2 << 20, 1 << 20, Flags.NOUNMAP | Flags.FUA)
                model[1 << 20 : 3 << 20] = bytes(2 << 20)
                used = backing.stat().st_blocks
                refused = errno_of(lambda: queue.discard(4 << 20, 1 << 20))
                if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 12):
                    assert refused == errno.EOPNOTSUPP
                else:
                    assert refused is None
                    model[4 << 20 : 5 << 20] = bytes(1 << 20)
                    # the file system's own blocks may have become more
                    assert backing.stat().st_blocks <= used - 2048 + 64
                assert read_all(queue, SIZE) == model
                with pytest.raises(OSError, match="READ") as caught:
                    queue.read(SIZE, memory(4096))
                assert caught.value.errno == errno.EINVAL
    assert backing.read_bytes() == model
