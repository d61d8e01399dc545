# SPDX-License-Identifier: MIT
"""A history in one file on a disk, for the time in which nobody tracks changes.

    the data files of the history, each compressed (zlib) | head (JSON) | length and crc32 of the head, magic

It is replaced as a whole: written, synced, renamed, the directory synced. A file whose head has no history is the
*mark* that stands in its place while the history is in use: after a crash it tells which generation was lost.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

import msgspec

from blksnap_ublk.cbt import mapped_file, metadata
from blksnap_ublk.cbt.errors import HistoryDamaged, HistoryError
from blksnap_ublk.cbt.history import History
from blksnap_ublk.cbt.metadata import HistoryRecord

VERSION = 1
_MAGIC = b"bsu saved change"
_TAIL = struct.Struct("<II16s")
_HEAD_MAX = 64 << 20
_PIECE = 1 << 20
_LEVEL = 1  # bitmaps and arrays are mostly zeroes: higher levels gain little


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A data file: bytes that it has, bytes of its compressed form, crc32 of what it holds."""

    name: str
    length: int
    stored: int
    checksum: int


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The head of a saved file. `history` is None for a mark. `note`: JSON of whoever saved it."""

    version: int
    generation: UUID
    history: HistoryRecord | None = None
    parts: tuple[Part, ...] = ()
    note: msgspec.Raw = msgspec.Raw(b"null")


def save(history: History, path: Path, note: bytes) -> None:
    """Save a history in which nobody marks any more, as of now; no snapshot of it is held afterwards.

    `note` is JSON. Raises HistoryError while a take or a resize is under way, OSError; then the file is as it was.
    """
    with history.resting() as (directory, record), _replacing(path) as file:
        if record.prepared is not None or record.resizing is not None:
            raise HistoryError("a take or a resize of it has not ended")
        parts = tuple(_store(directory / name, file) for name in record.files())
        head = Saved(VERSION, record.generation, msgspec.structs.replace(record, held=()), parts, msgspec.Raw(note))
        _write_head(file, head)


def write_mark(path: Path, generation: UUID) -> None:
    """Say that a history is in use, in place of the one saved. Raises OSError; then the file is as it was."""
    with _replacing(path) as file:
        _write_head(file, Saved(VERSION, generation))


def read(path: Path) -> Saved | None:
    """The head of a saved file, None where there is none. Raises HistoryDamaged, OSError."""
    if not path.exists():
        return None
    with os.fdopen(mapped_file.open_regular(path, os.O_RDONLY), "rb") as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if end < _TAIL.size:
                raise ValueError("too short")
            file.seek(end - _TAIL.size)
            length, checksum, magic = _TAIL.unpack(file.read(_TAIL.size))
            if magic != _MAGIC:
                raise ValueError("not a saved change history")
            if not 0 < length <= min(end - _TAIL.size, _HEAD_MAX):
                raise ValueError("the head has no possible length")
            file.seek(end - _TAIL.size - length)
            text = file.read(length)
            if zlib.crc32(text) != checksum:
                raise ValueError("the checksum does not match")
            head = msgspec.json.decode(text, type=Saved)
            _check(head, end - _TAIL.size - length)
        except (ValueError, msgspec.MsgspecError) as error:
            raise HistoryDamaged(f"{path}: {error}") from error
    return head


def restore(path: Path, saved: Saved, directory: Path) -> History:
    """The history that was saved, in an existing directory that has none, as it was then.

    Raises HistoryDamaged, OSError; then nothing of it is left in the directory.
    """
    record = saved.history
    if record is None:
        raise HistoryDamaged(f"{path}: holds no history")
    try:
        with path.open("rb") as file:
            for part in saved.parts:
                _load(file, part, directory / part.name)
        metadata.write(directory, record)
        return History.open(directory)
    except BaseException:
        metadata.remove(directory)
        raise


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of another, durably, when the block ends well."""
    part = path.with_name(path.name + ".part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_head(file: BinaryIO, head: Saved) -> None:
    text = msgspec.json.encode(head)
    file.write(text)
    file.write(_TAIL.pack(len(text), zlib.crc32(text), _MAGIC))


def _check(head: Saved, data: int) -> None:
    """Raises ValueError for a head that contradicts itself, or the `data` bytes before it."""
    if head.version != VERSION:
        raise ValueError(f"version {head.version} of the format, this program knows {VERSION}")
    names = []
    if head.history is not None:
        metadata.check(head.history)
        if head.history.prepared is not None or head.history.resizing is not None or head.history.held:
            raise ValueError("it was saved in the midst of something")
        if head.history.generation != head.generation:
            raise ValueError("the generation contradicts itself")
        names = head.history.files()
    if [part.name for part in head.parts] != names or sum(part.stored for part in head.parts) != data:
        raise ValueError("parts are missing")
    if any(part.length <= 0 or part.stored <= 0 for part in head.parts):
        raise ValueError("a part has no possible length")


def _store(source: Path, file: BinaryIO) -> Part:
    packer = zlib.compressobj(_LEVEL)
    length = stored = checksum = 0
    with source.open("rb") as opened:
        while piece := opened.read(_PIECE):
            length += len(piece)
            checksum = zlib.crc32(piece, checksum)
            stored += file.write(packer.compress(piece))
    stored += file.write(packer.flush())
    return Part(source.name, length, stored, checksum)


def _load(file: BinaryIO, part: Part, target: Path) -> None:
    """The next part of a saved file as a data file of its own. Raises HistoryDamaged, OSError."""
    mapped_file.create(target, part.length)
    done = checksum = 0
    with target.open("r+b") as opened:
        for piece in _unpacked(file, part):
            done += len(piece)
            checksum = zlib.crc32(piece, checksum)
            if done > part.length:
                break
            opened.write(piece)
    if done != part.length or checksum != part.checksum:
        raise HistoryDamaged(f"{part.name}: what was saved of it is damaged")


def _unpacked(file: BinaryIO, part: Part) -> Iterator[bytes]:
    unpacker = zlib.decompressobj()
    left = part.stored
    try:
        while left and (piece := file.read(min(left, _PIECE))):
            left -= len(piece)
            while piece:
                yield unpacker.decompress(piece, _PIECE)
                piece = unpacker.unconsumed_tail
        yield unpacker.flush()
    except zlib.error as error:
        raise HistoryDamaged(f"{part.name}: what was saved of it is damaged ({error})") from None
