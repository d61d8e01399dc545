# SPDX-License-Identifier: MIT
"""Making and closing: nothing is lost or left over, in any order, with I/O under way too."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import threading
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine import Op
from tests.unit.engine.disks import UNIT, Arena, Filtered, Snapshot, errno_of, make_file, memory, storage

SIZE = 1 << 20


def cycle(folder: Path, *, with_py: bool) -> None:
    with engine.Thread() as thread, Filtered(folder, "origin", SIZE, [thread]) as disk:
        with (
            Arena() as arena,
            storage(folder, SIZE) as store,
            Snapshot([disk], store, arena) as snapshot,
            engine.LocalQueue(thread, image=snapshot.images[0]) as view,
        ):
            disk.queue.write(0, memory(UNIT))
            view.read(0, memory(UNIT))
        if with_py:
            with engine.PyQueue(2, UNIT) as py, engine.LocalQueue(thread, py=py) as queue:
                tag = queue.submit(Op.WRITE, 0, UNIT, memory(UNIT))
                py.shutdown()
                assert errno_of(lambda: queue.wait(tag)) == errno.EIO


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_descriptors_threads_and_memory_stay_flat(folder: Path) -> None:
    for turn in range(6):
        cycle(folder, with_py=bool(turn % 2))
    gc.collect()
    before = descriptors(), tasks(), mappings(), resident()
    for turn in range(60):
        cycle(folder, with_py=bool(turn % 2))
    gc.collect()
    assert descriptors() == before[0]
    assert tasks() == before[1]
    if "san.so" not in os.environ.get("LD_PRELOAD", ""):  # sanitizers keep freed memory for a while
        assert mappings() <= before[2] + 4
        # one leaked portion of map memory or pool alone would be 8 MiB or more
        assert resident() <= before[3] + (6 << 20)


def test_what_is_in_use_cannot_be_closed(folder: Path) -> None:
    thread = engine.Thread()
    file = make_file(folder / "origin", SIZE, seed=1)
    device = engine.Device(size=SIZE, origin=file)
    queue = engine.LocalQueue(thread, device=device)
    arena = Arena()
    with storage(folder, SIZE) as store:
        image = engine.Image(device, store, arena, memory(engine.Image.state_bytes(SIZE)), serial=1)
        for used in (thread, file, device, arena, store):
            assert errno_of(used.close) == errno.EBUSY, used
            assert not used.closed
        queue.write(0, memory(UNIT))
        image.close()
        arena.close()
    queue.close()
    assert errno_of(file.close) == errno.EBUSY
    device.close()
    file.close()
    thread.close()
    for closed in (thread, file, device, arena, image, queue):
        closed.close()
        with pytest.raises(ValueError, match="closed"):
            closed.pointer  # noqa: B018


def test_a_queue_with_requests_under_way_is_finished_when_they_have_ended(folder: Path) -> None:
    with engine.Thread() as thread, Filtered(folder, "origin", SIZE, [thread]) as disk:
        disk.device.close_gate()
        tag = disk.queue.submit(Op.WRITE, 0, UNIT, memory(UNIT))
        assert errno_of(lambda: disk.queue.finish(timeout_ms=30)) == errno.ETIMEDOUT
        assert errno_of(lambda: disk.queue.write(0, memory(UNIT))) == errno.ESHUTDOWN
        assert errno_of(lambda: thread.stop(timeout_ms=30)) == errno.EBUSY
        disk.device.open_gate()
        assert disk.queue.wait(tag) == UNIT


def test_a_thread_that_waits_for_a_tag_is_told_of_the_end(folder: Path) -> None:
    with engine.Thread() as thread, Filtered(folder, "origin", SIZE, [thread], depth=1) as disk:
        disk.device.close_gate()
        tag = disk.queue.submit(Op.WRITE, 0, UNIT, memory(UNIT))
        errors: list[int | None] = []
        waiting = threading.Thread(target=lambda: errors.append(errno_of(lambda: disk.queue.write(0, memory(UNIT)))))
        waiting.start()
        assert errno_of(lambda: disk.queue.finish(timeout_ms=50)) == errno.ETIMEDOUT
        waiting.join(10)
        assert errors == [errno.ESHUTDOWN]
        disk.device.open_gate()
        assert disk.queue.wait(tag) == UNIT


def test_a_python_target_that_does_not_answer_holds_only_its_own_queue(folder: Path) -> None:
    with engine.Thread() as thread, Filtered(folder, "origin", SIZE, [thread]) as disk, engine.PyQueue(1, UNIT) as py:
        queue = engine.LocalQueue(thread, py=py)
        queue.submit(Op.WRITE, 0, UNIT, memory(UNIT))
        disk.queue.write(0, memory(UNIT))
        disk.queue.flush()
        assert errno_of(lambda: queue.finish(timeout_ms=30)) == errno.ETIMEDOUT
        py.shutdown()
        queue.finish()


def test_wrong_settings_are_refused(folder: Path) -> None:
    assert errno_of(lambda: engine.Thread(entries=1)) == errno.EINVAL
    assert errno_of(lambda: engine.Thread(pool_bytes=1000)) == errno.EINVAL
    assert errno_of(lambda: engine.Thread(slots=1 << 20)) == errno.EINVAL
    assert errno_of(lambda: engine.Thread(cpu=100_000)) == errno.EINVAL
    assert errno_of(lambda: engine.Device(size=0)) == errno.EINVAL
    assert errno_of(lambda: engine.Device(size=SIZE, unit=5000)) == errno.EINVAL
    assert errno_of(lambda: engine.PyQueue(1, 1 << 30)) == errno.EINVAL
    assert errno_of(lambda: engine.File(10_000)) == errno.EBADF
    with engine.Arena() as arena, pytest.raises(ValueError, match="portion"):
        arena.add(memory(4096))
    with engine.Thread() as thread, engine.Device(size=SIZE) as device:
        assert errno_of(lambda: engine.LocalQueue(thread, device=device, depth=0)) == errno.EINVAL
        assert errno_of(lambda: thread.del_barrier(3)) == errno.EINVAL
        assert errno_of(lambda: thread.add_barrier(10_000)) == errno.EBADF
        assert (
            errno_of(
                lambda: engine.UblkQueue(
                    thread, 0, queue_id=0, depth=1, desc_size=24, flags=0, zero_copy=False, device=device
                )
            )
            == errno.EOPNOTSUPP
        )


def test_barriers_keep_a_file_open_and_let_it_go(folder: Path) -> None:
    """A pipe's reading end sees the end of file only when nobody has the writing end any more."""
    with engine.Thread() as thread:
        reader, writer = os.pipe()
        slots = [thread.add_barrier(writer), thread.add_barrier(writer)]
        os.close(writer)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        thread.del_barrier(slots[0])
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        thread.del_barrier(slots[1])
        # kernels before 6.13 let go of it a moment later
        os.set_blocking(reader, True)
        assert os.read(reader, 1) == b""
        os.close(reader)


def test_the_lock_file_is_held_until_the_thread_is_gone(folder: Path) -> None:
    path = folder / "lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    other = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with engine.Thread(lock_fd=lock):
        os.close(lock)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # the kernel takes the ring apart behind our back
    fcntl.flock(other, fcntl.LOCK_EX)
    os.close(other)


def test_thread_settings_take_effect(folder: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    tasks = set(os.listdir("/proc/self/task"))
    with engine.Thread(cpu=cpu):
        [task] = set(os.listdir("/proc/self/task")) - tasks
        status = Path(f"/proc/self/task/{task}/status").read_text()
        assert status.startswith("Name:\tbsu-q")
        assert f"Cpus_allowed_list:\t{cpu}\n" in status
        blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        assert blocked & (1 << 14), "SIGTERM is for the main thread"
    try:
        with engine.Thread(io_flusher=True):
            assert not engine.get_io_flusher()
    except PermissionError:
        pytest.skip("PR_SET_IO_FLUSHER is refused without CAP_SYS_RESOURCE")
