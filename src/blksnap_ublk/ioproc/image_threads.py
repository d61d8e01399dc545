# SPDX-License-Identifier: MIT
"""The threads that serve images: each for several of them, with the barrier of every origin that they read."""

import logging
from dataclasses import dataclass, field

from blksnap_ublk.engine import Thread

log = logging.getLogger(__name__)

IMAGES_PER_THREAD = 4
STOP_LIMIT_MS = 1000


@dataclass
class _Barrier:
    slot: int
    users: int = 1


@dataclass
class ImageThread:
    """A thread, how many images it serves, and its barriers by device."""

    thread: Thread
    depth: int
    images: int = 0
    barriers: dict[str, _Barrier] = field(default_factory=dict)


class ImageThreads:
    """Finds a thread for each image. `lock_fd`: see engine.Thread; `io_flusher`: whether threads are to be that."""

    def __init__(self, *, lock_fd: int, io_flusher: bool) -> None:
        self._lock_fd = lock_fd
        self._io_flusher = io_flusher
        self._threads: list[ImageThread] = []

    def take(self, depth: int, device: str, origin_char: int) -> ImageThread:
        """A thread with room for a queue of `depth` tags, which holds the /dev/ublkcN of `device`. Raises OSError."""
        found = next((each for each in self._threads if each.images < IMAGES_PER_THREAD and each.depth >= depth), None)
        if found is None:
            found = ImageThread(self._start(depth), depth)
            self._threads.append(found)
        try:
            barrier = found.barriers.get(device)
            if barrier is None:
                found.barriers[device] = _Barrier(found.thread.add_barrier(origin_char))
            else:
                barrier.users += 1
        except BaseException:
            self._end_if_unused(found)
            raise
        found.images += 1
        return found

    def give(self, thread: ImageThread, device: str) -> None:
        """The image of `device` that it was taken for is not served any more. Raises OSError, changing nothing."""
        barrier = thread.barriers[device]
        if barrier.users == 1:
            thread.thread.del_barrier(barrier.slot)
            del thread.barriers[device]
        else:
            barrier.users -= 1
        thread.images -= 1
        self._end_if_unused(thread)

    def _start(self, depth: int) -> Thread:
        return Thread(slots=IMAGES_PER_THREAD * depth, lock_fd=self._lock_fd, io_flusher=self._io_flusher)

    def _end_if_unused(self, thread: ImageThread) -> None:
        if thread.images:
            return
        try:
            thread.thread.stop(timeout_ms=STOP_LIMIT_MS)
        except TimeoutError as error:
            log.warning("an image thread is kept, for the next image: %s", error)
        else:
            self._threads.remove(thread)
