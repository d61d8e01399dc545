# SPDX-License-Identifier: MIT
"""One instant for several devices, and what follows a switch."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, NamedTuple

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.device import Device
from blksnap_ublk.engine.file import File
from blksnap_ublk.engine.handle import Pinned, check, pin
from blksnap_ublk.engine.thread import Thread


class Late(TimeoutError):
    """Writes of a device did not end within the limit; nothing was switched. `index`: which of the devices."""

    def __init__(self, index: int, limit_ms: int) -> None:
        super().__init__(errno.ETIMEDOUT, f"writes in flight did not end within {limit_ms} ms")
        self.index = index


class Closing(NamedTuple):
    """How long gates were closed, in ns, and how much of that until the last write in flight had ended."""

    ns: int
    writes_ns: int


class NoRoom(OSError):
    """Writes of a device wait for room in a storage. `index`: which of the devices."""

    def __init__(self, index: int) -> None:
        super().__init__(errno.EBUSY, "writes wait for room in the difference storage")
        self.index = index


def wait_for_room(devices: Sequence[Device], *, limit_ms: int = 2000) -> None:
    """Before a switch: waits until no write waits for room in a storage, which would keep gates from being drained.

    Raises NoRoom.
    """
    late = ffi.new("unsigned int *")
    result = lib.bsu_wait_for_room([device.pointer for device in devices], len(devices), limit_ms, late)
    if result == -errno.EBUSY:
        raise NoRoom(late[0])
    check(result, "waiting for room")


def switch_all(
    devices: Sequence[Device], bitmaps: Sequence[Any], *, limit_ms: int = 2000, commit: Any = None
) -> Closing:
    """Switches all devices, each to what it was prepared for, at one instant.

    `bitmaps`: for each device its next active bitmap (zeroed, writable, whole pages), or None to go on with the present
    one. `commit`: writable memory whose first 32-bit word becomes 1 with the switch, or None. Devices stacked on one
    another come top first. Raises Late.
    """
    pinned = [None if bitmap is None else Pinned(bitmap) for bitmap in bitmaps]
    if len(pinned) != len(devices):
        raise ValueError(f"{len(devices)} devices and {len(pinned)} bitmaps")
    record = ffi.NULL if commit is None else pin(commit)
    gate_ns, writes_ns = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    late = ffi.new("unsigned int *")
    result = lib.bsu_switch_all(
        [device.pointer for device in devices],
        [ffi.NULL if bitmap is None else bitmap.pointer for bitmap in pinned],
        len(devices),
        limit_ms,
        ffi.cast("uint32_t *", record),
        gate_ns,
        writes_ns,
        late,
    )
    if commit is not None:
        ffi.release(record)
    if result < 0:
        for bitmap in pinned:
            if bitmap is not None:
                bitmap.let_go()
        if result == -errno.ETIMEDOUT:
            raise Late(late[0], limit_ms)
        check(result, "switch")
    for device, bitmap in zip(devices, pinned, strict=True):
        device.switched(bitmap)
    return Closing(int(gate_ns[0]), int(writes_ns[0]))


def settle(device: Device, *, timeout_ms: int = 10_000) -> None:
    """After a switch: waits until nobody uses what it replaced, lets go of that.

    After a drop it also hands what older images need of the one that went to them. OSError(ETIMEDOUT): call it again.
    """
    check(lib.bsu_switch_settle(device.pointer, timeout_ms), "settling a switch")
    device.settled()


def replay_swallowed(
    thread: Thread, device: Device, origin: File, *, slice_bytes: int = 64 << 20, limit_ms: int = 2000
) -> bool:
    """Sends trims that were swallowed while an image was held to the origin, through a thread that has its barrier.

    The gate is closed meanwhile, for at most `slice_bytes`. Returns True while there are more. OSError(ETIMEDOUT) when
    writes in flight have not ended after `limit_ms`.
    """
    return bool(
        check(
            lib.bsu_replay_swallowed(thread.pointer, device.pointer, origin.pointer, slice_bytes, limit_ms),
            "sending swallowed trims",
        )
    )
