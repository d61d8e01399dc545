# SPDX-License-Identifier: MIT
"""XFS: the superblock, the headers of the allocation groups, and the head of the log.

Whoever has mounted it for writing leaves at least an unmount record in the log, so that its head is elsewhere. Repair
tools, which may leave the log alone, write the headers of all groups anew.
"""

from __future__ import annotations

import hashlib
import struct

from blksnap_ublk.host.write_evidence.found import Found
from blksnap_ublk.host.write_evidence.raw import RawReader

_MAGIC = b"XFSB"
_BLOCK = 512  # of the log
_RECORD_MAGIC = 0xFEEDBABE
_HEADER_COVERS = 32 << 10
_UNMOUNT = 0x20  # of the flags of an operation
_AROUND = 64 << 10
_GROUPS_MAX = 1 << 14


def look(device: RawReader) -> Found | None:
    """None where there is no such file system. Raises OSError."""
    superblock = device.read(0, 512)
    if not superblock.startswith(_MAGIC):
        return None
    block_size = struct.unpack_from(">I", superblock, 4)[0]
    log_start = struct.unpack_from(">Q", superblock, 48)[0]
    group_blocks, groups = struct.unpack_from(">II", superblock, 84)
    log_blocks = struct.unpack_from(">I", superblock, 96)[0]
    sector = struct.unpack_from(">H", superblock, 102)[0]
    block_log, group_log = superblock[120], superblock[124]
    if not log_start or not log_blocks:
        return Found("xfs", None, "the log of its file system is on another device")
    if not groups or groups > _GROUPS_MAX or not 512 <= sector <= 64 << 10 or not 512 <= block_size <= 64 << 10:
        return Found("xfs", None, "its file system is too large to look at")
    hashed = hashlib.sha256(superblock)
    for group in range(groups):
        hashed.update(device.read(group * group_blocks * block_size, 4 * sector))
    # A file system block number: the group in its upper bits, the block in the group in `group_log` bits.
    group, block = log_start >> group_log, log_start & (1 << group_log) - 1
    log = _Log(device, (group * group_blocks + block) << block_log, log_blocks * block_size // _BLOCK)
    head = log.head()
    around, place = log.around(head)
    if not _is_clean(around, place):
        return Found("xfs", None, "its file system was not cleanly unmounted")
    hashed.update(struct.pack("<QI", head, log.cycle(0)))
    hashed.update(around)
    return Found("xfs", hashed.digest(), None)


class _Log:
    """The circular log, in blocks of 512 bytes. Each holds the number of the round in which it was written."""

    def __init__(self, device: RawReader, start: int, blocks: int) -> None:
        self._device = device
        self._start = start
        self._blocks = blocks

    def cycle(self, block: int) -> int:
        """The round in which a block was written."""
        first, second = struct.unpack(">II", self._device.read(self._start + block * _BLOCK, 8))
        return int(second if first == _RECORD_MAGIC else first)

    def head(self) -> int:
        """Where the next record goes: the first block of an older round than block 0."""
        now = self.cycle(0)
        low, high = 0, self._blocks
        while high - low > 1:
            middle = (low + high) // 2
            if self.cycle(middle) == now:
                low = middle
            else:
                high = middle
        return high

    def around(self, block: int) -> tuple[bytes, int]:
        """What was written last, before `block`, and what stands behind it; the place of `block` in it, in bytes."""
        end = min(block + _AROUND // _BLOCK, self._blocks)
        begin = max(block - _AROUND // _BLOCK, 0)
        return self._device.read(self._start + begin * _BLOCK, (end - begin) * _BLOCK), (block - begin) * _BLOCK


def _is_clean(around: bytes, end: int) -> bool:
    """Whether the last record in `around` before the byte `end` is that of an unmount, and ends there."""
    for begin in range(end - 2 * _BLOCK, -1, -_BLOCK):
        magic, _, version, length = struct.unpack_from(">IIII", around, begin)
        if magic == _RECORD_MAGIC:
            operations, size = (
                struct.unpack_from(">I", around, begin + 40)[0],
                struct.unpack_from(">I", around, begin + 320)[0],
            )
            headers = -(-size // _HEADER_COVERS) if version & 2 and size > _HEADER_COVERS else 1
            data = begin + headers * _BLOCK
            ends = data + -(-length // _BLOCK) * _BLOCK
            return bool(operations == 1 and ends == end and around[data + 9] & _UNMOUNT)
    return False
