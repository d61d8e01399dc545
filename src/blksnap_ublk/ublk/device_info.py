# SPDX-License-Identifier: MIT
"""What the driver knows of a device (`struct ublksrv_ctrl_dev_info`)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from blksnap_ublk.ublk.features import Features

DESC_SIZE = 24
"""Bytes from one request descriptor to the next: larger ones must be asked for (IO_DESC_SIZE), which is never done."""

MAX_DEPTH = 4096
MAX_QUEUES = 4096
MAX_IO_BYTES = 32 << 20

ANY_ID = -1


class DeviceState(enum.IntEnum):
    """State of a device."""

    DEAD = 0
    """Added and not started, or stopped."""
    LIVE = 1
    QUIESCED = 2
    """Its server is gone; requests wait for another one."""
    FAIL_IO = 3
    """Its server is gone; requests fail until another one comes."""


@dataclass(frozen=True)
class DeviceInfo:
    """Shape, owner and granted features of a device. `max_io_bytes` limits one request; `pid` is the server, or -1."""

    id: int
    queues: int
    depth: int
    max_io_bytes: int
    flags: Features
    state: DeviceState = DeviceState.DEAD
    pid: int = -1
    server_flags: int = 0
    """64 bits for the server's own use; all that the kernel keeps for it."""
    owner_uid: int = 0
    owner_gid: int = 0

    # queues, depth, state, pad, max I/O, id, pid, pad, flags, server flags, uid, gid, two reserved
    LAYOUT = struct.Struct("=HHHHIIiIQQIIQQ")

    def __post_init__(self) -> None:
        if not 1 <= self.queues <= MAX_QUEUES:
            raise ValueError(f"queues: {self.queues} is not between 1 and {MAX_QUEUES}")
        if not 1 <= self.depth <= MAX_DEPTH:
            raise ValueError(f"depth: {self.depth} is not between 1 and {MAX_DEPTH}")
        if not 4096 <= self.max_io_bytes <= MAX_IO_BYTES:
            raise ValueError(f"max_io_bytes: {self.max_io_bytes} is not between 4096 and {MAX_IO_BYTES}")
        if not -1 <= self.id < 1 << 31:
            raise ValueError(f"id: {self.id} is neither a device number nor -1 (any)")

    @property
    def block_path(self) -> str:
        return block_path(self.id)

    def pack(self) -> bytes:
        """The 64 bytes of the kernel's struct."""
        return self.LAYOUT.pack(
            self.queues,
            self.depth,
            self.state,
            0,
            self.max_io_bytes,
            self.id & 0xFFFFFFFF,
            self.pid,
            0,
            self.flags,
            self.server_flags,
            self.owner_uid,
            self.owner_gid,
            0,
            0,
        )

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> DeviceInfo:
        """From the kernel's struct."""
        queues, depth, state, _, max_io, number, pid, _, flags, server_flags, uid, gid, _, _ = cls.LAYOUT.unpack(data)
        return cls(
            id=number - (1 << 32) if number >> 31 else number,
            queues=queues,
            depth=depth,
            max_io_bytes=max_io,
            flags=Features(flags),
            state=DeviceState(state),
            pid=pid,
            server_flags=server_flags,
            owner_uid=uid,
            owner_gid=gid,
        )


def block_path(device_id: int) -> str:
    """The disk of a device."""
    return f"/dev/ublkb{device_id}"


def char_path(device_id: int) -> str:
    """What the server of a device opens."""
    return f"/dev/ublkc{device_id}"
