# SPDX-License-Identifier: MIT
"""Makes one object of the engine after the other on files of its own; a process with `failing_calls.c` preloaded.

    LD_PRELOAD=LIBRARY python -m tests.unit.shortage.engine_story LIBRARY FOLDER

The story is told again and again: in the first run the first call that asks for something fails, in the second run the
second, until a run meets no failure. Whatever could not be made is made again at once, and must have left nothing.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blksnap_ublk import engine
from blksnap_ublk.engine import _engine
from tests.unit.engine.disks import TRACKING_BLOCK, UNIT, make_file, memory, pattern

SIZE = 32 * UNIT
ERRORS = {errno.ENOMEM, errno.EMFILE, errno.EAGAIN}


class FailingCalls:
    """The preloaded library."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.pieces_held.restype = ctypes.c_long
        for line in Path("/proc/self/maps").read_text().splitlines():
            area, access, *_, name = line.split()
            if "x" in access and name == _engine.__file__:
                start, end = (int(number, 16) for number in area.split("-"))
                self._library.watch_calls(ctypes.c_size_t(start), ctypes.c_size_t(end - start))

    def fail(self, number: int) -> None:
        """The call with that number, from 1, fails; 0: none."""
        self._library.fail_call(number)

    @property
    def seen(self) -> int:
        """Calls since `fail`."""
        return int(self._library.calls_seen())

    def held(self) -> tuple[int, int, int]:
        """Pieces of memory that the engine holds; descriptors and threads of the process."""
        return (
            int(self._library.pieces_held()),
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
        )


class Story:
    """Everything that the engine can make without ublk. `failures`: how often something could not be made."""

    def __init__(self, calls: FailingCalls, folder: Path) -> None:
        self.calls = calls
        self.folder = folder
        self.failures = 0
        self.made: list[Any] = []
        self.queue: engine.LocalQueue | None = None
        self.views: list[engine.LocalQueue] = []
        self.content = pattern(3, SIZE)
        self.instants: list[bytes] = []

    def make(self, action: Callable[[], Any]) -> Any:
        """What `action` makes; if that fails, nothing is left of it, what exists goes on, and it can be repeated."""
        before = self.calls.held()
        try:
            return self._keep(action())
        except MemoryError:
            pass
        except OSError as error:
            if error.errno not in ERRORS:
                raise
        self.failures += 1
        assert self.calls.held() == before, f"{self.calls.held()} is held, it was {before}"
        self.go_on()
        return self._keep(action())

    def _keep(self, made: Any) -> Any:
        if made is not None:
            self.made.append(made)
        return made

    def go_on(self) -> None:
        """Reads and writes all that is there; that takes no memory."""
        seen = self.calls.seen
        data = memory(SIZE)
        if self.queue:
            self.queue.read(0, data)
            assert data[:] == self.content
            at = (self.failures * 7 + len(self.made)) % 32 * UNIT
            part = pattern(1000 + len(self.made) + self.failures, UNIT)
            self.queue.write(at, part)
            self.content = self.content[:at] + part + self.content[at + UNIT :]
        for view, instant in zip(self.views, self.instants, strict=False):
            view.read(0, data)
            assert data[:] == instant, "an image is not its instant"
        assert self.calls.seen == seen, "memory was asked for on the way of I/O"

    def tell(self) -> None:
        """From the beginning to the end."""
        make, folder = self.make, self.folder
        origin_path = folder / "origin"
        origin_path.write_bytes(self.content)
        with origin_path.open("rb+") as opened, (folder / "lock").open("w") as lock:
            origin = make(lambda: engine.File(opened.fileno()))
            thread = make(lambda: engine.Thread(pool_bytes=2 << 20, lock_fd=lock.fileno()))
            barrier = make_number(make, lambda: thread.add_barrier(lock.fileno()))
            bitmap, swallowed = memory(UNIT), memory(UNIT)
            device = make(
                lambda: engine.Device(
                    size=SIZE, tracking_block=TRACKING_BLOCK, origin=origin, bitmap=bitmap, swallowed=swallowed
                )
            )
            self.queue = make(lambda: engine.LocalQueue(thread, device=device, depth=4))
            self.go_on()
            arena = make(engine.Arena)
            arena.add(memory(engine.ARENA_PORTION))
            area = make(lambda: make_file(folder / "storage", 4 * SIZE, storage=True))
            storage_state = memory(engine.STORAGE_STATE_BYTES)
            storage = make(lambda: engine.Storage(storage_state))
            records = memory(storage.records_bytes(4 * SIZE))
            make(lambda: storage.add_area(area, 0, 4 * SIZE, records))
            images = [self.take(device, storage, arena, serial) for serial in (1, 2)]
            for image in images:
                self.views.append(make(functools.partial(engine.LocalQueue, thread, image=image, depth=2)))
                self.go_on()
            target = make(lambda: engine.PyQueue(4, UNIT))
            make(lambda: engine.LocalQueue(thread, py=target, depth=4)).finish()
            target.close()
            while images:
                self.drop(device, images.pop(0))
            make(lambda: thread.del_barrier(barrier))
        while self.made:
            self.made.pop().close()

    def take(self, device: engine.Device, storage: engine.Storage, arena: engine.Arena, serial: int) -> engine.Image:
        """An image of this moment."""
        state = memory(engine.Image.state_bytes(SIZE, UNIT))
        image: engine.Image = self.make(lambda: engine.Image(device, storage, arena, state, serial=serial))
        self.make(lambda: device.prepare_take(image))
        engine.switch_all([device], [memory(UNIT)])
        engine.settle(device)
        self.instants.append(self.content)
        self.go_on()
        return image

    def drop(self, device: engine.Device, image: engine.Image) -> None:
        """The oldest image goes."""
        self.views.pop(0).finish()
        self.instants.pop(0)
        self.make(lambda: device.prepare_drop(image))
        engine.switch_all([device], [None])
        engine.settle(device)
        self.go_on()


def make_number(make: Callable[[Callable[[], Any]], Any], action: Callable[[], int]) -> int:
    """What gives a number is not to be closed."""
    found: list[int] = []
    make(lambda: found.append(action()))
    return found[0]


def main(library: str, folder: str) -> None:
    calls = FailingCalls(library)
    Story(calls, Path(folder)).tell()
    nothing = calls.held()
    number, met = 0, True
    refused = 0
    while met:
        number += 1
        calls.fail(number)
        story = Story(calls, Path(folder))
        try:
            story.tell()
        except AssertionError as reason:
            raise AssertionError(f"call {number} fails: {reason}") from reason
        met = calls.seen >= number
        refused += story.failures
        calls.fail(0)
        assert calls.held() == nothing, f"call {number}: {calls.held()} is held at the end, not {nothing}"
    print(f"{number - 1} calls, {refused} of which something could not do without")


if __name__ == "__main__":
    main(*sys.argv[1:])
