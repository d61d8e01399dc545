# SPDX-License-Identifier: MIT
"""Targets written in Python, behind the engine's real queues (local transport)."""

import contextlib
import errno
import logging
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blksnap_ublk import engine
from blksnap_ublk.ublk import pyservice
from blksnap_ublk.ublk.params import Attributes
from blksnap_ublk.ublk.pyservice import MAX_SLOTS, PyService
from blksnap_ublk.ublk.pytarget import PyTarget, params_of

SIZE = 1 << 20
MAX_IO = 64 << 10


class Reader(PyTarget):
    size = SIZE

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = bytes([offset // 512 % 251]) * len(buf)


class Disk(PyTarget):
    """A RAM disk with all operations, which keeps a list of those that change something."""

    size = SIZE

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.calls: list[tuple[str, int, int]] = []

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset: int, buf: memoryview) -> None:
        self.calls.append(("write", offset, len(buf)))
        self.data[offset : offset + len(buf)] = buf

    def flush(self) -> None:
        self.calls.append(("flush", 0, 0))

    def discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))
        self.data[offset : offset + length] = b"D" * length

    def write_zeroes(self, offset: int, length: int) -> None:
        self.calls.append(("write_zeroes", offset, length))
        self.data[offset : offset + length] = bytes(length)


@contextlib.contextmanager
def serve(target: PyTarget, depth: int = 16) -> Iterator[engine.LocalQueue]:
    """A queue whose requests go to `target`."""
    service = PyService(target)
    backend = service.begin(depth, MAX_IO)
    thread = engine.Thread()
    queue = engine.LocalQueue(thread, depth=depth, py=backend.py)
    try:
        yield queue
    finally:
        queue.finish()
        thread.stop()
        service.end()


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    """What is inside must raise OSError with this errno."""
    with pytest.raises(OSError, match=r".*") as raised:
        yield
    assert raised.value.errno == number


BLOCK_RANGES = st.tuples(st.integers(0, SIZE // 512 - 1), st.integers(1, MAX_IO // 512)).map(
    lambda pair: (pair[0] * 512, min(pair[1] * 512, SIZE - pair[0] * 512))
)
STEPS = st.tuples(st.sampled_from(["read", "write", "discard", "write_zeroes"]), BLOCK_RANGES, st.binary(min_size=1))


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=20))
def test_what_is_written_is_read(steps: list[tuple[str, tuple[int, int], bytes]]) -> None:
    model = bytearray(SIZE)
    with serve(Disk()) as queue:
        for operation, (start, length), seed in steps:
            end = start + length
            if operation == "read":
                found = bytearray(length)
                queue.read(start, found)
                assert found == model[start:end]
            elif operation == "write":
                model[start:end] = (seed * (length // len(seed) + 1))[:length]
                queue.write(start, bytes(model[start:end]))
            elif operation == "discard":
                model[start:end] = b"D" * length
                queue.discard(start, length)
            else:
                model[start:end] = bytes(length)
                queue.write_zeroes(start, length)


def test_fua_flushes_before_the_write_ends() -> None:
    disk = Disk()
    with serve(disk) as queue:
        queue.write(0, bytes(512), engine.Flags.FUA)
        queue.write(512, bytes(512))
        queue.flush()
    assert disk.calls == [("write", 0, 512), ("flush", 0, 0), ("write", 512, 512), ("flush", 0, 0)]


def test_os_errors_keep_their_errno(caplog: pytest.LogCaptureFixture) -> None:
    class Full(Disk):
        def write(self, offset: int, buf: memoryview) -> None:
            raise OSError(errno.ENOSPC, "full")

        def flush(self) -> None:
            raise OSError("without a number")

    with serve(Full()) as queue:
        with fails(errno.ENOSPC):
            queue.write(0, bytes(512))
        with fails(errno.EIO):
            queue.flush()
        queue.read(0, bytearray(512))
    assert not caplog.records


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt, MemoryError])
def test_other_exceptions_are_eio_with_one_traceback(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Disk):
        def write(self, offset: int, buf: memoryview) -> None:
            raise error("broken")

    with caplog.at_level(logging.ERROR), serve(Broken()) as queue:
        for _ in range(3):
            with fails(errno.EIO):
                queue.write(4096, bytes(512))
        queue.read(0, bytearray(512))
    assert [record.exc_info is not None for record in caplog.records] == [True, False, False]
    assert "Broken" in caplog.text
    assert "4096" in caplog.text


def test_data_of_a_write_cannot_be_changed() -> None:
    class Careless(Disk):
        def write(self, offset: int, buf: memoryview) -> None:
            assert buf.readonly
            super().write(offset, buf)

    with serve(Careless()) as queue:
        queue.write(0, b"x" * 512)


def test_what_is_missing_is_not_offered() -> None:
    with serve(Reader()) as queue:
        found = bytearray(1024)
        queue.read(512, found)
        assert found == b"\x01" * 1024
        with fails(errno.EOPNOTSUPP):
            queue.write(0, bytes(512))
        with fails(errno.EOPNOTSUPP):
            queue.flush()
        with fails(errno.EOPNOTSUPP):
            queue.discard(0, 512)


def test_abilities_are_parameters() -> None:
    read_only, full = params_of(Reader(), MAX_IO), params_of(Disk(), MAX_IO)
    assert read_only.basic.attributes == Attributes.READ_ONLY
    assert read_only.discard is None
    assert full.basic.attributes == Attributes.VOLATILE_CACHE | Attributes.FUA
    assert full.discard is not None
    assert full.discard.max_discard > 0
    assert full.discard.max_write_zeroes > 0

    class Plain(Reader):
        block = 4096

        def write(self, offset: int, buf: memoryview) -> None: ...

        def write_zeroes(self, offset: int, length: int) -> None: ...

    plain = params_of(Plain(), MAX_IO)
    assert plain.basic.attributes == Attributes(0)
    assert plain.basic.logical_block == 4096
    assert plain.discard is not None
    assert plain.discard.max_discard == 0


def test_impossible_targets() -> None:
    class Nothing(PyTarget):
        size = SIZE

    class Sizeless(PyTarget):
        def read(self, offset: int, buf: memoryview) -> None: ...

    class Odd(Reader):
        size = 1000

    with pytest.raises(TypeError, match="no method read"):
        PyService(Nothing())
    with pytest.raises(TypeError, match="size"):
        params_of(Sizeless(), MAX_IO)
    with pytest.raises(ValueError, match="size"):
        params_of(Odd(), MAX_IO)


def test_workers_work_at_the_same_time() -> None:
    together = threading.Barrier(4, timeout=30)

    class Meeting(Disk):
        workers = 4

        def read(self, offset: int, buf: memoryview) -> None:
            together.wait()
            super().read(offset, buf)

    with serve(Meeting()) as queue:
        buffers = [bytearray(512) for _ in range(4)]
        tags = [queue.submit(engine.Op.READ, 512 * n, 512, buffer) for n, buffer in enumerate(buffers)]
        for tag in tags:
            assert queue.wait(tag) == 512


def test_more_requests_than_buffers() -> None:
    depth = 4 * MAX_SLOTS
    with serve(Reader(), depth) as queue:
        buffers = [bytearray(512) for _ in range(depth)]
        tags = [queue.submit(engine.Op.READ, 512 * n, 512, buffer) for n, buffer in enumerate(buffers)]
        for tag in tags:
            queue.wait(tag)
    assert [buffer[0] for buffer in buffers] == [n % 251 for n in range(depth)]


def test_a_buffer_cannot_be_kept() -> None:
    kept: list[memoryview] = []

    class Keeper(Disk):
        def write(self, offset: int, buf: memoryview) -> None:
            kept.append(buf)

    with serve(Keeper()) as queue:
        queue.write(0, b"x" * 512)
        with pytest.raises(ValueError, match="released"):
            bytes(kept[0])


def test_memory_that_is_still_referred_to_stays() -> None:
    kept: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

    class Keeper(Disk):
        def write(self, offset: int, buf: memoryview) -> None:
            kept.append(np.frombuffer(buf, np.uint8))

    with serve(Keeper()) as queue:
        queue.write(0, b"x" * 512)
    assert kept[0][0] == ord("x")


def test_a_call_that_never_returns_does_not_keep_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyservice, "END_TIMEOUT", 0.2)
    entered, leave = threading.Event(), threading.Event()

    class Stuck(Disk):
        def flush(self) -> None:
            entered.set()
            leave.wait(60)

    service = PyService(Stuck())
    backend = service.begin(4, MAX_IO)
    with engine.Thread() as thread:
        queue = engine.LocalQueue(thread, depth=4, py=backend.py)
        tag = queue.submit(engine.Op.FLUSH, 0)
        assert entered.wait(30)
        service.end()
        with fails(errno.EIO):
            queue.wait(tag)
        queue.finish()
    leave.set()
    assert "still busy" in caplog.text
