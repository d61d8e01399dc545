# SPDX-License-Identifier: MIT
"""The C engine, one thin class for each of its objects.

Objects belong to one control thread at a time; `LocalQueue`'s requests and `PyQueue` may be used by any thread.
Everything is closed in the reverse order of its making; what is still in use raises OSError(EBUSY) and stays open.
Failures raise OSError with the errno of the C function. Offsets and lengths are bytes.
"""

from blksnap_ublk.engine.control import Control
from blksnap_ublk.engine.counters import Counters
from blksnap_ublk.engine.device import Device
from blksnap_ublk.engine.file import File, FileInfo
from blksnap_ublk.engine.image import Adopted, Image, ImageStatus
from blksnap_ublk.engine.local_queue import LocalQueue
from blksnap_ublk.engine.process import get_io_flusher, lock_memory, notify_fd, set_doorbell, set_io_flusher
from blksnap_ublk.engine.py_queue import PyQueue, PyRequest
from blksnap_ublk.engine.request import Flags, Op
from blksnap_ublk.engine.storage import ARENA_PORTION, STORAGE_STATE_BYTES, Arena, Storage
from blksnap_ublk.engine.storing import Storing
from blksnap_ublk.engine.sweep import Sweep
from blksnap_ublk.engine.switch import Closing, Late, NoRoom, replay_swallowed, settle, switch_all, wait_for_room
from blksnap_ublk.engine.thread import BUFFERS_BYTES, Thread
from blksnap_ublk.engine.ublk_queue import UblkQueue, UblkStatus

__all__ = [
    "ARENA_PORTION",
    "BUFFERS_BYTES",
    "STORAGE_STATE_BYTES",
    "Adopted",
    "Arena",
    "Closing",
    "Control",
    "Counters",
    "Device",
    "File",
    "FileInfo",
    "Flags",
    "Image",
    "ImageStatus",
    "Late",
    "LocalQueue",
    "NoRoom",
    "Op",
    "PyQueue",
    "PyRequest",
    "Storage",
    "Storing",
    "Sweep",
    "Thread",
    "UblkQueue",
    "UblkStatus",
    "get_io_flusher",
    "lock_memory",
    "notify_fd",
    "replay_swallowed",
    "set_doorbell",
    "set_io_flusher",
    "settle",
    "switch_all",
    "wait_for_room",
]
