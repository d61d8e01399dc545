# SPDX-License-Identifier: MIT
"""ext2, ext3, ext4: the superblock, and that of the journal.

A mount for writing changes `s_mnt_count`, `s_mtime` and `s_wtime`, each e2fsck, tune2fs, resize2fs or debugfs that
writes `s_wtime` (in seconds), each transaction the sequence number in the superblock of the journal.
"""

from __future__ import annotations

import struct

from blksnap_ublk.host.write_evidence.found import Found
from blksnap_ublk.host.write_evidence.raw import RawReader

_SUPERBLOCK, _LENGTH = 1024, 1024
_MAGIC = 0xEF53
_VALID = 0x0001
_ERRORS = 0x0002
_HAS_JOURNAL = 0x0004
_RECOVER = 0x0004
_JOURNAL_DEVICE = 0x0008
_EXTENTS = struct.Struct("<HHHHI")
_EXTENT = struct.Struct("<IHHI")
_EXTENT_MAGIC = 0xF30A
_JOURNAL_MAGIC = 0xC03B3998


def look(device: RawReader) -> Found | None:
    """None where there is no such file system. Raises OSError."""
    block = device.read(_SUPERBLOCK, _LENGTH)
    if struct.unpack_from("<H", block, 0x38)[0] != _MAGIC:
        return None
    written = struct.unpack_from("<I", block, 0x30)[0] | block[0x274] << 32
    state = struct.unpack_from("<H", block, 0x3A)[0]
    compatible, incompatible = struct.unpack_from("<II", block, 0x5C)
    if state & _ERRORS or not state & _VALID or incompatible & _RECOVER:
        return Found("ext", None, "its file system was not cleanly unmounted", written)
    if incompatible & _JOURNAL_DEVICE:
        return Found("ext", None, "it is the journal of another device", written)
    parts = [block]
    if compatible & _HAS_JOURNAL and struct.unpack_from("<I", block, 0xE4)[0] == 0:
        journal = _journal(device, block)
        if journal is None:
            return Found("ext", None, "the journal of its file system was not found", written)
        parts.append(journal)
    elif compatible & _HAS_JOURNAL:
        return Found("ext", None, "the journal of its file system is on another device", written)
    return Found("ext", b"".join(parts), None, written)


def _journal(device: RawReader, superblock: bytes) -> bytes | None:
    """The superblock of the journal, which lies where the copy of its inode's block map in the superblock says."""
    if superblock[0xFD] != 1:
        return None
    block_size = 1024 << min(struct.unpack_from("<I", superblock, 0x18)[0], 6)
    magic, entries, _, depth, _ = _EXTENTS.unpack_from(superblock, 0x10C)
    if magic == _EXTENT_MAGIC:
        if depth or not entries:
            return None
        first, _, high, low = _EXTENT.unpack_from(superblock, 0x10C + _EXTENTS.size)
        place = high << 32 | low
        if first:
            return None
    else:
        place = struct.unpack_from("<I", superblock, 0x10C)[0]
    found = device.read(place * block_size, 1024)
    return found if struct.unpack_from(">I", found)[0] == _JOURNAL_MAGIC else None
