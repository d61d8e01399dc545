# SPDX-License-Identifier: MIT
"""A set of images that was replaced is freed when every thread has left it. Seen with ASan; otherwise only by luck."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack
from pathlib import Path

from blksnap_ublk import engine
from blksnap_ublk.engine.request import Op
from tests.unit.engine.disks import UNIT, Arena, Filtered, Snapshot, memory, storage

SIZE = 4 << 20
READ = 64 * UNIT
CHANGES = 5000


def test_who_looks_for_its_data_may_go_on_looking(folder: Path) -> None:
    """Images come and go as fast as they can, while one that stays is read: each of its units is looked for in all."""
    with ExitStack() as stack:
        one, reader = (stack.enter_context(engine.Thread()) for _ in range(2))
        disk = stack.enter_context(Filtered(folder, "origin", SIZE, [one]))
        arena = stack.enter_context(Arena())
        store = stack.enter_context(storage(folder, 4 * SIZE))
        held = []
        for _ in range(8):
            held.append(stack.enter_context(Snapshot([disk], store, arena)))
            # one unit of each leaf: the others are looked for one by one
            for start in range(0, SIZE, READ):
                disk.queue.write(start, random.randbytes(UNIT))
        view = stack.enter_context(engine.LocalQueue(reader, image=held[0].images[0], depth=16))
        stop = threading.Event()
        results: list[int] = []

        def read() -> None:
            buffers = [memory(READ) for _ in range(8)]
            number = 0
            while not stop.is_set():
                start = number % (SIZE // READ) * READ
                requests = [view.submit(Op.READ, start, READ, buffer) for buffer in buffers]
                results.extend(view.wait(request) for request in requests)
                number += 1

        thread = threading.Thread(target=read)
        thread.start()
        try:
            for _ in range(CHANGES):
                with Snapshot([disk], store, arena):
                    pass
        finally:
            stop.set()
            thread.join()
        assert set(results) == {READ}
