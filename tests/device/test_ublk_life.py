# SPDX-License-Identifier: MIT
"""The life of a device: refusals, disturbances, signals, deaths, and that nothing is left over."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from blksnap_ublk import engine, ublk
from blksnap_ublk.ublk import control_plane, helper, serving
from blksnap_ublk.ublk.negotiation import DataPath
from tests.fio import fio_verify
from tests.loop_devices import loop_device, mounted, run
from tests.ublk_server import Server

MIB = 1 << 20
SIZE = 32 * MIB


def threads_and_descriptors() -> tuple[int, int]:
    """How many this process has, without the kernel's workers, which end when they have been idle for a while."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/self/task/{task}/comm").read_text())
    return sum(not name.startswith("iou-wrk") for name in names), len(os.listdir("/proc/self/fd"))


def no_more_than(before: tuple[int, int]) -> bool:
    """A thread that has been joined can still be seen for a moment, before a test as well as after it."""
    threads, descriptors = threads_and_descriptors()
    return threads <= before[0] and descriptors <= before[1]


def eventually(condition: str, check: Callable[[], bool], limit: float = 60) -> None:
    deadline = time.monotonic() + limit
    while not check():
        assert time.monotonic() < deadline, f"not within {limit} s: {condition}"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    engine.notify_fd()  # made at the first use, for good
    before = threads_and_descriptors()
    yield
    eventually("all devices are gone", lambda: not ublk.device_ids(), 5)
    assert not list(Path("/dev").glob("ublk[bc]*"))
    eventually("threads and descriptors are as before", lambda: no_more_than(before), 10)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """An allocated file on an ext4 of its own."""
    with loop_device(tmp_path / "base", 256 * MIB) as base, mounted(base, tmp_path / "files") as directory:
        path = directory / "disk.img"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE)
        yield path


@contextlib.contextmanager
def program(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that has printed its first line; ended with SIGKILL."""
    code = f"import os, sys, time, mmap\n{script}\nprint('ready', flush=True)\ntime.sleep(600)\n"
    process = subprocess.Popen([sys.executable, "-S", "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


# ---- refusals ----


def test_zero_copy_for_a_python_target_is_refused() -> None:
    class Reader(ublk.PyTarget):
        size = MIB

        def read(self, offset: int, buf: memoryview) -> None: ...

    with pytest.raises(OSError, match=r"zero-copy.*Python") as raised:
        ublk.Device.add(Reader(), data_path="zero-copy")
    assert raised.value.errno == errno.EOPNOTSUPP


def test_an_id_that_is_taken() -> None:
    with ublk.Device.add(ublk.Null(MIB), id=7) as device:
        assert device.path == "/dev/ublkb7"
        with pytest.raises(OSError, match="ADD_DEV of device 7") as raised:
            ublk.Device.add(ublk.Null(MIB), id=7)
        assert raised.value.errno == errno.EEXIST


def test_impossible_numbers() -> None:
    for options in ({"depth": 0}, {"depth": 5000}, {"queues": 0}, {"max_io": 1 << 30}, {"data_path": "fast"}):
        with pytest.raises(ValueError, match=r"."):
            ublk.Device.add(ublk.Null(MIB), **options)
    with pytest.raises(ValueError, match="size"):
        ublk.Device.add(ublk.Null(1000))


def test_commands_on_devices_that_do_not_exist() -> None:
    with ublk.Control() as control:
        for command in (control.info, control.get_params, control.stop, control.delete, control.start_recovery):
            with pytest.raises(OSError, match="device 99") as raised:
                command(99)
            assert raised.value.errno == errno.ENODEV
        with pytest.raises(OSError, match="UPDATE_SIZE"):
            control.update_size(99, MIB)


def test_a_control_cannot_be_used_after_a_fork() -> None:
    with ublk.Control() as control:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                control.features()
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        assert control.features()


# ---- disturbances at the start ----

HOLD = "fd = os.open(sys.argv[1], os.O_RDWR)"
SNATCH = """
deadline = time.monotonic() + 60
print("ready", flush=True)
while time.monotonic() < deadline:
    try:
        fd = os.open(sys.argv[1], os.O_RDWR)
    except OSError:
        continue
    time.sleep(0.7)
    os.close(fd)
    break
"""


def test_somebody_holds_the_char_device_for_a_moment() -> None:
    with program(SNATCH, "/dev/ublkc3"), ublk.Device.add(ublk.Null(MIB), id=3) as device:
        run("dd", f"if={device.path}", "of=/dev/null", "count=8", "iflag=direct")


def test_somebody_keeps_the_char_device() -> None:
    with ublk.Control() as control:
        info = control_plane.create_device(control, ublk.Wish(), device_id=4)
        with program(HOLD, "/dev/ublkc4") as holder:
            with pytest.raises(OSError, match=rf"open in process {holder.pid} \(python") as raised:
                serving.open_char(info.id, timeout=0.5)
            assert raised.value.errno == errno.EBUSY
            with pytest.raises(TimeoutError, match=rf"served by process {holder.pid}"):
                control_plane.delete_device(control, info.id, timeout=0.5)
        eventually("device 4 is gone", lambda: not ublk.device_ids())


def test_a_start_without_a_server_ends() -> None:
    with ublk.Control() as control:
        info = control_plane.create_device(control, ublk.Wish())
        control.set_params(info.id, ublk.Null(MIB).params(DataPath.COPY, info.max_io_bytes))
        with pytest.raises(TimeoutError, match="START_DEV"):
            helper.start(info.id, os.getpid(), timeout=0.5)
        control_plane.delete_device(control, info.id)


def test_a_queue_that_cannot_be_armed_is_an_error() -> None:
    with ublk.Control() as control, engine.Thread() as thread:
        info = control_plane.create_device(control, ublk.Wish(), queues=2, depth=16)
        target = ublk.Null(MIB)
        control.set_params(info.id, target.params(DataPath.COPY, info.max_io_bytes))
        char = serving.open_char(info.id)
        backend = target.begin(32, info.max_io_bytes)
        with pytest.raises(serving.UnfinishedQueues, match="could not be armed") as raised:
            serving.start_queues([thread], char, replace(info, queues=3), DataPath.COPY, backend)
        assert len(raised.value.queues) == 2
        helper.stop(info.id, force=True, timeout=10)
        serving.finish_queues(raised.value.queues)
        os.close(char)
        control_plane.delete_device(control, info.id)
    target.end()


def test_control_stays_usable_after_a_time_out() -> None:
    with ublk.Control() as control:
        info = control_plane.create_device(control, ublk.Wish())
        control.set_params(info.id, ublk.Null(MIB).params(DataPath.COPY, info.max_io_bytes))
        for _ in range(20):
            with pytest.raises(TimeoutError):
                control.start(info.id, os.getpid(), timeout=0.01)
        assert control.info(info.id).state is ublk.DeviceState.DEAD
        control_plane.delete_device(control, info.id)


# ---- the end ----


def test_many_devices_leave_nothing() -> None:
    before = threads_and_descriptors()
    for _ in range(5):
        with ublk.Device.add(ublk.Null(MIB), queues=2):
            pass
        eventually("threads and descriptors are as before", lambda: no_more_than(before), 10)


def test_a_device_in_use_is_not_stopped() -> None:
    device = ublk.Device.add(ublk.Null(MIB))
    with device:
        with program(HOLD, device.path) as holder:
            with pytest.raises(OSError, match=f"in use by process {holder.pid}") as raised:
                device.stop()
            assert raised.value.errno == errno.EBUSY
            run("dd", f"if={device.path}", "of=/dev/null", "count=8", "iflag=direct")
        device.stop()
    device.close()  # twice does no harm


DIRTY = "fd = os.open(sys.argv[1], os.O_RDWR)\nfor n in range(16): os.pwrite(fd, b'dirty!!!' * 131072, n << 20)"


@pytest.mark.parametrize("recovery", ["reissue", "off"])
def test_dirty_page_cache_is_not_lost(image: Path, recovery: str, caplog: pytest.LogCaptureFixture) -> None:
    device = ublk.Device.add(ublk.Loop(image), recovery=recovery)
    with device, program(DIRTY, device.path) as writer:
        device.close()
        assert f"stopped while in use by process {writer.pid}" in caplog.text
    assert image.read_bytes()[: 16 * MIB] == b"dirty!!!" * (2 * MIB)


def test_what_a_mounted_file_system_has_not_written_is_not_lost(image: Path, tmp_path: Path) -> None:
    with ublk.Device.add(ublk.Loop(image)) as device:
        run("mkfs.ext4", "-q", device.path)
        (tmp_path / "top").mkdir()
        run("mount", device.path, str(tmp_path / "top"))
        (tmp_path / "top" / "file").write_bytes(b"cached" * 100_000)
        with pytest.raises(OSError, match=f"in use by mount {tmp_path}/top"):
            device.stop()
        device.close()
    subprocess.run(["umount", tmp_path / "top"], check=True)
    with loop_device(image) as again:
        (tmp_path / "again").mkdir()
        run("mount", again, str(tmp_path / "again"))
        found = (tmp_path / "again" / "file").read_bytes()
        run("umount", str(tmp_path / "again"))
    assert found == b"cached" * 100_000


def test_a_device_stopped_from_outside(image: Path) -> None:
    with Server(image) as server:
        helper.stop(server.id, force=True, timeout=10)
        status, messages = server.wait()
        assert status == 0
        assert "stopped from outside" in messages


# ---- signals ----


@pytest.mark.quick
def test_sigterm_ends_a_server(image: Path) -> None:
    with Server(image, queues=2) as server:
        run("dd", "if=/dev/urandom", f"of={server.path}", "bs=1M", "count=4")
        server.signal(signal.SIGTERM)
        assert server.wait()[0] == 0


def test_a_server_waits_for_the_end_of_use_at_the_first_signal(image: Path, tmp_path: Path) -> None:
    with Server(image) as server:
        with mounted(server.path, tmp_path / "top") as top:
            server.signal(signal.SIGINT)
            assert server.process.stderr is not None
            assert f"in use by mount {top}" in server.process.stderr.readline()
            (top / "file").write_text("still there")
        assert server.wait()[0] == 0


def test_the_second_signal_leaves_a_device_that_can_be_recovered(image: Path, tmp_path: Path) -> None:
    with Server(image) as server, mounted(server.path, tmp_path / "top") as top:
        (top / "file").write_text("kept")
        server.signal(signal.SIGTERM)
        assert server.process.stderr is not None
        assert "in use" in server.process.stderr.readline()
        server.signal(signal.SIGTERM)
        assert server.wait()[0] == 128 + signal.SIGTERM
        with Server(image, recover=server.id) as successor:
            assert successor.path == server.path
            run("sync", "-f", str(top))
            run("umount", str(top))
            successor.signal(signal.SIGTERM)
            assert successor.wait()[0] == 0
        top.mkdir(exist_ok=True)
        run("mount", "-t", "tmpfs", "nothing", str(top))  # for the end of `mounted`


# ---- deaths and hand-overs ----


@pytest.mark.parametrize("way", ["auto", "copy"])
def test_writers_survive_the_death_of_the_server(image: Path, way: str) -> None:
    with ThreadPoolExecutor() as pool, Server(image, queues=2, data_path=way) as server:
        writer = pool.submit(fio_verify, server.path, size="16m")
        eventually("fio writes", lambda: int(Path(f"/sys/block/ublkb{server.id}/stat").read_text().split()[4]) > 20)
        server.signal(signal.SIGKILL)
        server.wait()
        with Server(image, recover=server.id) as successor:
            writer.result(120)
            successor.signal(signal.SIGTERM)
            assert successor.wait()[0] == 0


def test_stopping_a_device_whose_server_dies_meanwhile_ends(image: Path) -> None:
    with Server(image) as server, program(DIRTY, server.path):
        server.signal(signal.SIGSTOP)  # nothing is answered any more …
        stopping = ThreadPoolExecutor().submit(helper.stop, server.id, force=True, timeout=10)
        time.sleep(1)
        assert not stopping.done()
        server.signal(signal.SIGKILL)  # … and now for good
        stopping.result(20)


def test_without_recovery_the_device_goes_with_its_server(image: Path) -> None:
    with Server(image, recovery="off") as server:
        server.signal(signal.SIGKILL)
        server.wait()
        eventually("the disk is gone", lambda: not os.path.exists(server.path))


def test_a_device_changes_hands_within_a_process(image: Path) -> None:
    device = ublk.Device.add(ublk.Loop(image))
    if ublk.Features.QUIESCE not in device.features:
        device.close()
        pytest.skip("this kernel cannot take a device from a living server (QUIESCE, Linux 6.16)")
    run("dd", "if=/dev/zero", f"of={device.path}", "bs=64k", "count=1", "oflag=direct")
    device.detach()
    with ublk.Device.recover(ublk.Loop(image), device.id) as again:
        assert again.path == device.path
        run("dd", f"if={again.path}", "of=/dev/null", "bs=64k", "count=1", "iflag=direct")


def test_recovery_with_another_target_is_refused(image: Path) -> None:
    with Server(image) as server:
        server.signal(signal.SIGKILL)
        server.wait()
        with pytest.raises(OSError, match=f"its target {MIB}"):
            ublk.Device.recover(ublk.Null(MIB), server.id)


def test_a_living_server_is_not_recovered_from(image: Path) -> None:
    with Server(image) as server:
        with pytest.raises(OSError, match="START_USER_RECOVERY"):
            ublk.Device.recover(ublk.Null(SIZE), server.id, timeout=0.5)
        run("dd", f"if={server.path}", "of=/dev/null", "count=8", "iflag=direct")


def test_the_size_of_a_live_device_changes() -> None:
    with ublk.Device.add(ublk.Null(SIZE)) as device, ublk.Control() as control:
        if ublk.Features.UPDATE_SIZE not in device.features:
            pytest.skip("this kernel cannot change the size of a device (Linux 6.16)")
        control.update_size(device.id, 2 * SIZE)
        assert int(run("blockdev", "--getsize64", device.path)) == 2 * SIZE


# ---- examples and the process ----

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextlib.contextmanager
def example(name: str, *arguments: str) -> Iterator[str]:
    """The disk that an example serves; ended by SIGINT."""
    process = subprocess.Popen([sys.executable, EXAMPLES / name, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        assert path.startswith("/dev/ublkb")
        yield path
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_the_ramdisk_example(tmp_path: Path) -> None:
    with example("ramdisk.py", "32") as path, mounted(path, tmp_path / "ram") as top:
        (top / "file").write_bytes(b"x" * MIB)


def test_the_flaky_example(tmp_path: Path) -> None:
    path = tmp_path / "flaky.img"
    path.write_bytes(b"y" * 4 * MIB)
    with example("flaky.py", str(path), "--delay", "1", "--bad", f"{MIB}+4096") as disk:
        run("dd", f"if={disk}", "of=/dev/null", "bs=64k", "count=16", "iflag=direct")
        command = ["dd", f"if={disk}", "of=/dev/null", "bs=64k", "skip=16", "count=1", "iflag=direct"]
        assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_the_process_is_protected(image: Path) -> None:
    with Server(image) as server:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        locked = next(line for line in status.splitlines() if line.startswith("VmLck:"))
        assert int(locked.split()[1]) > 0
    ublk.Device.add(ublk.Null(MIB)).close()
    assert engine.get_io_flusher()
