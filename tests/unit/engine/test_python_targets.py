# SPDX-License-Identifier: MIT
"""The batches of requests that a Python target gets, and what becomes of those that it does not answer."""

from __future__ import annotations

import errno
import random
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import Flags, Op, PyRequest
from tests.unit.engine.disks import errno_of, memory

SIZE = 4 << 20
MAX = 65536


def serve(queue: engine.PyQueue, disk: bytearray, seen: list[PyRequest]) -> None:
    """A RAM disk; reads of the last block fail with ENODATA."""
    waiting = select.poll()
    waiting.register(queue.event_fd, select.POLLIN)
    while True:
        try:
            batch = queue.take()
        except OSError as error:
            if error.errno == errno.ESHUTDOWN:
                return
            raise
        if not batch:
            waiting.poll()
            continue
        seen += batch
        results = []
        for slot, op, _, start, length in batch:
            buffer = queue.buffer(slot)
            if op == Op.READ:
                buffer[:length] = disk[start : start + length]
            elif op == Op.WRITE:
                disk[start : start + length] = buffer[:length]
            elif op == Op.WRITE_ZEROES:
                disk[start : start + length] = bytes(length)
            last = op == Op.READ and start + length == SIZE
            results.append(-errno.ENODATA if last else 0)
        queue.commit([request.slot for request in batch], results)


@contextmanager
def ram_disk(slots: int, workers: int = 1) -> Iterator[tuple[engine.PyQueue, bytearray, list[PyRequest]]]:
    disk, seen = bytearray(SIZE), list[PyRequest]()
    with engine.PyQueue(slots, MAX) as py:
        threads = [threading.Thread(target=serve, args=(py, disk, seen)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        yield py, disk, seen
        py.shutdown()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_requests_arrive_as_they_were_made(thread: engine.Thread) -> None:
    with ram_disk(4) as (py, disk, seen), engine.LocalQueue(thread, py=py) as queue:
        data = memory(8192)
        data[:] = b"\xa5" * 8192
        queue.write(4096, data, Flags.FUA)
        queue.write_zeroes(8192, 4096, Flags.NOUNMAP)
        queue.flush()
        queue.discard(0, 1 << 20)
        queue.read(4096, data)
        assert data[:] == b"\xa5" * 4096 + bytes(4096)
        assert errno_of(lambda: queue.read(SIZE - 4096, bytearray(4096))) == errno.ENODATA
        assert errno_of(lambda: queue.read(0, memory(MAX + 4096))) == errno.EINVAL
    assert [(each.op, each.flags, each.start, each.length) for each in seen] == [
        (Op.WRITE, Flags.FUA, 4096, 8192),
        (Op.WRITE_ZEROES, Flags.NOUNMAP, 8192, 4096),
        (Op.FLUSH, 0, 0, 0),
        (Op.DISCARD, 0, 0, 1 << 20),
        (Op.READ, 0, 4096, 8192),
        (Op.READ, 0, SIZE - 4096, 4096),
    ]
    assert disk[4096:8192] == b"\xa5" * 4096


@pytest.mark.parametrize(("slots", "workers"), [(1, 1), (3, 2), (64, 1)])
def test_more_requests_than_slots_from_several_queues(slots: int, workers: int) -> None:
    """Two queues on two threads share the slots; whoever waits gets its turn."""
    with ram_disk(slots, workers) as (py, disk, seen), engine.Thread() as one, engine.Thread() as two:
        queues = [engine.LocalQueue(thread, py=py, depth=32) for thread in (one, two)]
        buffers = [memory(4096) for _ in range(64)]
        for turn in range(10):
            tags = []
            for number, buffer in enumerate(buffers):
                buffer[:] = random.Random(turn * 64 + number).randbytes(4096)
                tags.append(queues[number % 2].submit(Op.WRITE, number * 4096, 4096, buffer))
            assert [queues[number % 2].wait(tag) for number, tag in enumerate(tags)] == [4096] * 64
            assert disk[: 64 * 4096] == b"".join(buffer[:] for buffer in buffers)
        for queue in queues:
            queue.finish()
    assert len(seen) == 640


def test_a_commit_of_what_was_not_taken_breaks_nothing(thread: engine.Thread) -> None:
    with engine.PyQueue(2, 4096) as py, engine.LocalQueue(thread, py=py) as queue:
        tag = queue.submit(Op.WRITE, 0, 4096, memory(4096))
        assert select.select([py.event_fd], [], [], 10)[0]
        for slots in ([0, 1], [7], [2**32 - 1]):
            with pytest.raises(OSError, match="commit") as caught:
                py.commit(slots, [0] * len(slots))
            assert caught.value.errno == errno.EINVAL
        [request] = py.take()
        assert py.take() == []
        assert not select.select([py.event_fd], [], [], 0)[0]
        with pytest.raises(OSError, match="commit"):
            py.commit([1 - request.slot, request.slot], [0, -errno.ENOSPC])
        with pytest.raises(OSError, match="commit"):
            py.commit([request.slot], [0])
        with pytest.raises(OSError, match="request") as caught:
            queue.wait(tag)
        assert caught.value.errno == errno.ENOSPC


def test_when_python_is_gone_everything_ends_with_eio(thread: engine.Thread) -> None:
    with engine.PyQueue(2, 4096) as py, engine.LocalQueue(thread, py=py, depth=8) as queue:
        # two in slots, of which one is taken, and two that wait for one
        tags = [queue.submit(Op.WRITE, 0, 4096, memory(4096)) for _ in range(4)]
        assert select.select([py.event_fd], [], [], 10)[0]
        [taken] = py.take(1)
        py.shutdown()
        for tag in tags:
            with pytest.raises(OSError, match="request") as caught:
                queue.wait(tag)
            assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="FLUSH") as caught:
            queue.flush()
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="commit"):
            py.commit([taken.slot], [0])
        with pytest.raises(OSError, match="Python queue") as caught:
            py.take()
        assert caught.value.errno == errno.ESHUTDOWN
        assert select.select([py.event_fd], [], [], 0)[0]
        with pytest.raises(OSError, match="local queue") as caught:
            engine.LocalQueue(thread, py=py)
        assert caught.value.errno == errno.ESHUTDOWN


def test_a_target_in_use_cannot_be_closed(thread: engine.Thread) -> None:
    py = engine.PyQueue(1, 4096)
    with engine.LocalQueue(thread, py=py):
        with pytest.raises(OSError, match="closing") as caught:
            py.close()
        assert caught.value.errno == errno.EBUSY
    py.close()
    py = engine.PyQueue(1, 4096)
    part = py.buffer(0)[:100]
    py.close()
    part[:] = bytes(100)
