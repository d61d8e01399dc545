# SPDX-License-Identifier: MIT
"""Signs that a device is a part of something else: then a file system that is found on it may be a forgotten one."""

from __future__ import annotations

import struct

from blksnap_ublk.host.write_evidence.raw import RawReader

_MD = struct.pack("<I", 0xA92B4EFC)
_BCACHE = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
_ZFS = (struct.pack("<Q", 0x00BAB10C), struct.pack(">Q", 0x00BAB10C))
_SECTOR = 512

_SIGNS = (
    *((at, b"LABELONE", "a physical volume of LVM") for at in (0, 512, 1024, 1536)),
    (0, b"LUKS\xba\xbe", "encrypted"),
    (0, _MD, "a member of a RAID"),
    (4096, _MD, "a member of a RAID"),
    *((page - 10, b"SWAPSPACE2", "swap") for page in (4096, 8192, 16384, 65536)),
    (4096 + 24, _BCACHE, "a part of a bcache"),
    (512, b"EFI PART", "divided into partitions"),
    (4096, b"EFI PART", "divided into partitions"),
)


def use_of(device: RawReader, size: int) -> str | None:
    """What else the device of `size` bytes is, as in "it is …"; None where nothing says so. Raises OSError."""
    begin = device.read(0, min(size, 64 << 10))
    for at, sign, use in _SIGNS:
        if begin[at : at + len(sign)] == sign:
            return use
    if _has_partitions(begin, size):
        return "divided into partitions"
    sectors = size // _SECTOR
    for at in ((sectors - 16 & ~7) * _SECTOR, (size & ~0xFFFF) - 0x10000):
        if at > 0 and device.read(at, len(_MD)) == _MD:
            return "a member of a RAID"
    if size >= 256 << 10:
        label = device.read(128 << 10, 128 << 10)
        if any(label[at : at + 8] in _ZFS for at in range(0, len(label), 1024)):
            return "a part of a ZFS pool"
    return None


def _has_partitions(begin: bytes, size: int) -> bool:
    """Whether the first sector holds a partition table of old, and not a boot program that only looks like it."""
    if begin[510:512] != b"\x55\xaa":
        return False
    for at in range(446, 510, 16):
        active, kind, first, count = struct.unpack_from("<B3xB3xII", begin, at)
        if kind and not active & 0x7F and first and count and (first + count) * _SECTOR <= size:
            return True
    return False
