# SPDX-License-Identifier: MIT
"""Sectors that say who wrote them: made for a write, and read back from whatever a device or an image holds.

A sector is eight copies of a stamp of 64 bytes: device, sector, writer, sequence of its writer's writes, when the write
was submitted, when the writer's write before it had completed (ns of the monotonic clock), and a CRC. So a sector of
which only a part was written, or that lies in a wrong place, or comes from another device, is found out.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SECTOR = 512
COPIES = 8
STAMP = SECTOR // COPIES
_MAGIC = 0x4B414550535343  # "CSSPEAK"
_HEAD = struct.Struct("<QIIQQQQ12x")
_CRC = struct.Struct("<I")
assert _HEAD.size + _CRC.size == STAMP


@dataclass(frozen=True)
class Spoken:
    """What a sector says. `before`: completion of its writer's write before this one, 0 for the first."""

    writer: int
    sequence: int
    submitted: int
    before: int


def speaking(device: int, first: int, count: int, said: Spoken) -> bytes:
    """The content of `count` sectors from `first` on of a device."""
    parts = []
    for sector in range(first, first + count):
        head = _HEAD.pack(_MAGIC, device, said.writer, sector, said.sequence, said.submitted, said.before)
        parts.append((head + _CRC.pack(zlib.crc32(head))) * COPIES)
    return b"".join(parts)


def hear(device: int, content: bytes) -> tuple[dict[int, Spoken], list[str]]:
    """What each sector of a whole device says, and what is wrong with those that say nothing sensible.

    A sector of zeroes, which nobody wrote, is not in the dictionary.
    """
    stamps: npt.NDArray[np.uint8] = np.frombuffer(content, dtype=np.uint8).reshape(-1, COPIES, STAMP)
    torn = (stamps != stamps[:, :1]).any(axis=(1, 2))
    written = stamps.any(axis=(1, 2))
    found: dict[int, Spoken] = {}
    wrong = [f"device {device}: sector {sector} is torn" for sector in np.flatnonzero(torn).tolist()]
    for sector in np.flatnonzero(written & ~torn).tolist():
        stamp = content[sector * SECTOR : sector * SECTOR + STAMP]
        magic, of_device, writer, of_sector, sequence, submitted, before = _HEAD.unpack_from(stamp)
        if magic != _MAGIC or _CRC.unpack_from(stamp, _HEAD.size)[0] != zlib.crc32(stamp[: _HEAD.size]):
            wrong.append(f"device {device}: sector {sector} holds what nobody wrote")
        elif (of_device, of_sector) != (device, sector):
            wrong.append(f"device {device}: sector {sector} holds sector {of_sector} of device {of_device}")
        else:
            found[sector] = Spoken(writer, sequence, submitted, before)
    return found, wrong
