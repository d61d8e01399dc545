# SPDX-License-Identifier: MIT
"""Requests through the local transport to real files, by io_uring."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import Flags, Op
from tests.unit.engine.disks import Filtered, errno_of, make_file, memory, pattern, read_all

SIZE = 8 << 20


def test_a_null_device_answers_everything(thread: engine.Thread) -> None:
    with engine.Device(size=1 << 50) as device, engine.LocalQueue(thread, device=device) as queue:
        queue.read((1 << 50) - 4096, memory(4096))
        queue.write(0, memory(1 << 20), Flags.FUA)
        queue.flush()
        queue.discard(0, 1 << 30)
        queue.write_zeroes(0, 1 << 30)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("zero_copy", [True, False])
def test_data_are_the_same_as_in_a_model(folder: Path, thread: engine.Thread, zero_copy: bool, direct: bool) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    model = bytearray(pattern(1, SIZE))
    file = make_file(folder / "origin", SIZE, seed=1, direct=direct)
    buffer = memory(1 << 20)
    with (
        file,
        engine.Device(size=SIZE, origin=file) as device,
        engine.LocalQueue(thread, device=device, zero_copy=zero_copy) as queue,
    ):
        for step in range(400):
            length = 512 * dice.choice([1, 2, 7, 8, 64, 100, 2048])
            start = 512 * dice.randrange((SIZE - length) // 512 + 1)
            op = dice.choice(list(Op))
            data = memoryview(buffer)[:length]
            if op is Op.READ:
                queue.read(start, data)
                assert data == model[start : start + length], step
            elif op is Op.WRITE:
                data[:] = dice.randbytes(length)
                queue.write(start, data, dice.choice([Flags.NONE, Flags.FUA]))
                model[start : start + length] = data
            elif op is Op.FLUSH:
                queue.flush()
            elif op is Op.DISCARD:
                queue.discard(start, length)
                model[start : start + length] = bytes(length)
            else:
                flags = Flags(dice.choice([0, Flags.FUA, Flags.NOUNMAP, Flags.NOUNMAP | Flags.FUA]))
                queue.write_zeroes(start, length, flags)
                model[start : start + length] = bytes(length)
        assert read_all(queue, SIZE) == model
    assert (folder / "origin").read_bytes() == model


def test_memory_that_direct_io_cannot_use_is_copied(folder: Path, thread: engine.Thread) -> None:
    file = make_file(folder / "origin", SIZE, seed=2)
    odd = memoryview(bytearray(8192 + 3))[3:]
    with file, engine.Device(size=SIZE, origin=file) as device, engine.LocalQueue(thread, device=device) as queue:
        queue.read(4096, odd)
        assert odd == pattern(2, SIZE)[4096 : 4096 + 8192]
        odd[:] = b"\x5a" * 8192
        queue.write(512, odd)
    assert (folder / "origin").read_bytes()[512 : 512 + 8192] == odd


def test_discard_gives_space_up_and_nounmap_keeps_it(folder: Path, thread: engine.Thread) -> None:
    file = make_file(folder / "origin", SIZE, seed=3)
    path = folder / "origin"
    full = path.stat().st_blocks
    with file, engine.Device(size=SIZE, origin=file) as device, engine.LocalQueue(thread, device=device) as queue:
        queue.write_zeroes(0, 1 << 20, Flags.NOUNMAP)
        assert path.stat().st_blocks == full
        queue.write_zeroes(1 << 20, 1 << 20)
        assert path.stat().st_blocks == full - 2048
        queue.discard(2 << 20, 1 << 20)
        assert path.stat().st_blocks == full - 4096
    assert path.read_bytes() == bytes(3 << 20) + pattern(3, SIZE)[3 << 20 :]


def test_zeroes_are_written_where_nothing_else_is_supported(thread: engine.Thread, folder: Path) -> None:
    """tmpfs has no ZERO_RANGE: down to plain writes, in pieces."""
    fd = os.memfd_create("origin", os.MFD_CLOEXEC)
    os.write(fd, pattern(4, SIZE))
    with (
        engine.File(fd) as file,
        engine.Device(size=SIZE, origin=file) as device,
        engine.LocalQueue(thread, device=device) as queue,
    ):
        queue.write_zeroes(512, (3 << 20) + 512, Flags.NOUNMAP | Flags.FUA)
        expected = bytearray(pattern(4, SIZE))
        expected[512 : (3 << 20) + 1024] = bytes((3 << 20) + 512)
        assert read_all(queue, SIZE) == expected
    os.close(fd)


def test_errors_are_those_of_the_file(folder: Path, thread: engine.Thread) -> None:
    path = folder / "origin"
    make_file(path, SIZE, seed=1).close()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with (
        engine.File(fd) as file,
        engine.Device(size=SIZE, origin=file) as device,
        engine.LocalQueue(thread, device=device) as queue,
    ):
        assert errno_of(lambda: queue.write(0, memory(4096))) == errno.EBADF
        assert errno_of(lambda: queue.write_zeroes(0, 4096)) == errno.EBADF
        queue.read(0, memory(4096))
        os.truncate(path, 8192)
        assert errno_of(lambda: queue.read(16384, memory(4096))) == errno.EIO
    os.close(fd)


def test_bad_requests_are_refused(folder: Path, thread: engine.Thread) -> None:
    file = make_file(folder / "origin", SIZE, seed=1)
    with file, engine.Device(size=SIZE, origin=file) as device, engine.LocalQueue(thread, device=device) as queue:
        assert errno_of(lambda: queue.read(SIZE, memory(4096))) == errno.EINVAL
        assert errno_of(lambda: queue.read(SIZE - 512, memory(4096))) == errno.EINVAL
        assert errno_of(lambda: queue.read(100, memory(4096))) == errno.EINVAL
        assert errno_of(lambda: queue.write(0, bytearray(100))) == errno.EINVAL
        assert errno_of(lambda: queue.discard(0, 0)) == errno.EINVAL
        assert errno_of(lambda: queue.wait(1)) == errno.EINVAL
        assert errno_of(lambda: queue.wait(10_000)) == errno.EINVAL
        with pytest.raises(ValueError, match="buffer"):
            queue.submit(Op.READ, 0, 8192, bytearray(100))
        queue.read(SIZE - 4096, memory(4096))


def test_a_queue_serves_exactly_one_thing(thread: engine.Thread) -> None:
    with engine.Device(size=4096) as device, engine.PyQueue(1, 4096) as py:
        with pytest.raises(ValueError, match="exactly one"):
            engine.LocalQueue(thread)
        with pytest.raises(ValueError, match="exactly one"):
            engine.LocalQueue(thread, device=device, py=py)


def test_requests_wait_for_tags_and_submit_does_not(folder: Path, thread: engine.Thread) -> None:
    with Filtered(folder, "origin", SIZE, [thread], depth=2) as disk:
        disk.device.close_gate()
        tags = [disk.queue.submit(Op.WRITE, 0, 4096, memory(4096)) for _ in range(2)]
        assert errno_of(lambda: disk.queue.submit(Op.WRITE, 0, 4096, memory(4096))) == errno.EAGAIN
        with pytest.raises(TimeoutError):
            disk.queue.wait(tags[0], timeout_ms=10)
        waiting = threading.Thread(target=disk.queue.read, args=(0, memory(4096)))
        waiting.start()
        disk.device.open_gate()
        assert [disk.queue.wait(tag) for tag in tags] == [4096, 4096]
        waiting.join(10)
        assert not waiting.is_alive()
        assert disk.queue.counters.parked == 2


@pytest.mark.parametrize("zero_copy", [True, False])
def test_a_ring_smaller_than_what_is_asked_of_it(folder: Path, zero_copy: bool) -> None:
    """Rings of 4 entries, 256 requests at once, a pool that holds only a few of them: all wait, none is lost."""
    with (
        engine.Thread(entries=4, pool_bytes=3 << 20) as thread,
        Filtered(folder, "origin", SIZE, [thread], depth=256, zero_copy=zero_copy) as disk,
    ):
        for turn in range(4):
            buffers = [memory(32768) for _ in range(256)]
            for number, buffer in enumerate(buffers):
                buffer[:] = bytes([number ^ turn]) * 32768
            tags = [disk.queue.submit(Op.WRITE, i * 32768, 32768, buffers[i]) for i in range(256)]
            assert [disk.queue.wait(tag) for tag in tags] == [32768] * 256
            assert disk.path.read_bytes() == b"".join(bytes([i ^ turn]) * 32768 for i in range(256))


def test_many_users_and_queue_threads_at_once(folder: Path) -> None:
    with (
        engine.Thread() as one,
        engine.Thread() as two,
        Filtered(folder, "origin", SIZE, [one, two, one], depth=4) as disk,
    ):
        failures: list[str] = []

        def work(number: int) -> None:
            dice = random.Random(number)
            mine = range(number * (SIZE // 12), (number + 1) * (SIZE // 12) - 8192, 8192)
            buffer, check = memory(4096), memory(4096)
            for _ in range(150):
                queue = disk.queues[dice.randrange(3)]
                start = dice.choice(mine) // 4096 * 4096
                buffer[:] = dice.randbytes(16) * 256
                queue.write(start, buffer)
                disk.queues[dice.randrange(3)].read(start, check)
                if check[:] != buffer[:]:
                    failures.append(f"worker {number} at {start}")

        workers = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert not any(worker.is_alive() for worker in workers)
        assert not failures
        assert sum(queue.counters.writes for queue in disk.queues) == 12 * 150
        assert disk.marked()
