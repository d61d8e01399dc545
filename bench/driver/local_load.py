# SPDX-License-Identifier: MIT
"""Requests made in C, without the GIL, to a local queue of this process."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

from blksnap_ublk.engine._engine import ffi, lib

from blksnap_ublk import engine

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "bench" / "local_load.so"


class _Load(ctypes.Structure):
    """struct local_load of local_load.h."""

    _fields_ = [
        ("submit", ctypes.c_void_p),
        ("wait", ctypes.c_void_p),
        ("local", ctypes.c_void_p),
        ("op", ctypes.c_uint8),
        ("depth", ctypes.c_uint),
        ("length", ctypes.c_uint64),
        ("requests", ctypes.c_uint64),
        ("memory", ctypes.c_void_p),
        ("place", ctypes.c_void_p),
        ("ended", ctypes.c_void_p),
        ("arg", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Load:
    """What a load took: seconds, and processor seconds of the whole process."""

    requests: int
    seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def run_load(queue: engine.LocalQueue, op: engine.Op, length: int, depth: int, requests: int) -> Load:
    """Makes all requests at byte 0, `depth` at once, and returns when all have ended. OSError when one fails."""
    memory = mmap.mmap(-1, depth * length)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def pointer(of: object) -> int:
        return int(ffi.cast("uintptr_t", of))

    load = _Load(
        submit=pointer(ffi.addressof(lib, "bsu_local_submit")),
        wait=pointer(ffi.addressof(lib, "bsu_local_wait")),
        local=pointer(queue.pointer),
        op=int(op),
        depth=depth,
        length=length,
        requests=requests,
        memory=address,
    )
    run = ctypes.CDLL(str(LIBRARY)).local_load_run
    begun, cpu_begun = time.monotonic(), time.process_time()
    result = run(ctypes.byref(load))
    seconds, cpu_seconds = time.monotonic() - begun, time.process_time() - cpu_begun
    if result < 0:
        raise OSError(-result, os.strerror(-result), op.name)
    return Load(requests, seconds, cpu_seconds)
