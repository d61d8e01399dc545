# SPDX-License-Identifier: MIT
"""A sweep that cannot begin for want of a thread has changed nothing, and begins when it is told again."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from blksnap_ublk import engine
from blksnap_ublk.ioproc import messages
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


def test_it_may_be_told_again(left: tuple[int, int]) -> None:
    loop, done = Loop(), threading.Event()
    files = SharedFiles()
    devices, storages, map_memory = Devices(files, lock_fd=-1, io_flusher=False), Storages(files), MapMemory()
    images = Images(devices, storages, map_memory, ImageThreads(lock_fd=-1, io_flusher=False))
    started = []

    def start_thread() -> engine.Thread:
        started.append(True)
        if len(started) == 1:
            raise OSError(errno.ENOMEM, "no thread")
        return engine.Thread()

    def end() -> None:
        done.set()
        loop.stop()

    sweeping = Sweeping(loop, storages, images, map_memory, end, start_thread)
    state, buffers = left
    storages.open(messages.OpenStorage(KEY, 4096, adopt=True), Descriptors([os.dup(state)]))
    sweeping.add_unstored(messages.Unstored(["left"]), Descriptors([os.dup(buffers)]))
    with pytest.raises(OSError, match="no thread"):
        sweeping.begin(messages.Sweep([]))
    assert not sweeping.swept
    sweeping.begin(messages.Sweep([]))
    with pytest.raises(OSError, match="has been swept, or is about to be"):
        sweeping.begin(messages.Sweep([]))
    loop.run()
    assert done.is_set()
    assert sweeping.swept
    storages.close(messages.CloseStorage(KEY))
    map_memory.close()
    loop.close()
