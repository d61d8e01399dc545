# SPDX-License-Identifier: MIT
"""A sweep that cannot begin: told again where it has changed nothing, begun again by itself otherwise."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blksnap_ublk import engine
from blksnap_ublk.ioproc import messages, sweeping
from blksnap_ublk.ioproc.devices import Devices
from blksnap_ublk.ioproc.image_threads import ImageThreads
from blksnap_ublk.ioproc.images import Images
from blksnap_ublk.ioproc.shared_files import SharedFiles
from blksnap_ublk.ioproc.storages import MapMemory, Storages
from blksnap_ublk.ioproc.sweeping import Sweeping
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.rpc.loop import Loop

KEY = "storage"


@pytest.fixture
def left() -> Iterator[tuple[int, int]]:
    """Descriptors of what a former process left: the state of a storage without areas, and buffers with nothing."""
    with ExitStack() as stack:
        found = []
        for size in (engine.STORAGE_STATE_BYTES, engine.BUFFERS_BYTES):
            found.append(os.memfd_create("left", os.MFD_CLOEXEC))
            stack.callback(os.close, found[-1])
            os.posix_fallocate(found[-1], 0, size)
        with mmap.mmap(found[0], engine.STORAGE_STATE_BYTES) as state:
            engine.Storage(state).close()
        yield found[0], found[1]


class Former:
    """An io process' sweeping of what a former one left; it has ended when `run` returns."""

    def __init__(self, left: tuple[int, int], start_thread: Callable[[], engine.Thread]) -> None:
        self._loop = Loop()
        files = SharedFiles()
        devices, self._storages = Devices(files, lock_fd=-1, io_flusher=False), Storages(files)
        self._map_memory = MapMemory()
        images = Images(devices, self._storages, self._map_memory, ImageThreads(lock_fd=-1, io_flusher=False))
        self.sweeping = Sweeping(self._loop, self._storages, images, self._map_memory, self._loop.stop, start_thread)
        state, self._buffers = left
        self._storages.open(messages.OpenStorage(KEY, 4096, adopt=True), Descriptors([os.dup(state)]))
        self.tell_unstored()

    def tell_unstored(self) -> None:
        self.sweeping.add_unstored(messages.Unstored(["left"]), Descriptors([os.dup(self._buffers)]))

    def run(self) -> None:
        self._loop.run()
        assert self.sweeping.swept
        self._storages.close(messages.CloseStorage(KEY))
        self._map_memory.close()
        self._loop.close()


def test_it_may_be_told_again(left: tuple[int, int]) -> None:
    started = []

    def start_thread() -> engine.Thread:
        started.append(True)
        if len(started) == 1:
            raise OSError(errno.ENOMEM, "no thread")
        return engine.Thread()

    former = Former(left, start_thread)
    with pytest.raises(OSError, match="no thread"):
        former.sweeping.begin(messages.Sweep([]))
    assert not former.sweeping.swept
    mapped = Path("/proc/self/maps").read_text().count("memfd:left")
    former.tell_unstored()
    assert Path("/proc/self/maps").read_text().count("memfd:left") == mapped
    former.sweeping.begin(messages.Sweep([]))
    with pytest.raises(OSError, match="has been swept, or is about to be"):
        former.sweeping.begin(messages.Sweep([]))
    former.run()


def test_a_check_that_cannot_begin_is_begun_again(left: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def begun(*arguments: Any, **named: Any) -> engine.Sweep:
        tried.append(True)
        if len(tried) == 1:
            raise OSError(errno.ENOMEM, "no memory")
        return engine.Sweep(*arguments, **named)

    monkeypatch.setattr(sweeping, "Sweep", begun)
    monkeypatch.setattr(sweeping, "AGAIN", 0.01)
    former = Former(left, engine.Thread)
    former.sweeping.begin(messages.Sweep([]))
    former.run()
    assert len(tried) == 2
