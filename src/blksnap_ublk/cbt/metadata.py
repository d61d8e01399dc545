# SPDX-License-Identifier: MIT
"""The file that says which files make up a history and what they mean; replaced as a whole by a rename.

It outlives the death of any process at any point. It does not outlive the machine: neither it nor the files that it
names are synced, for they live in a tmpfs.
"""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path
from uuid import UUID

import msgspec

from blksnap_ublk.cbt import mapped_file
from blksnap_ublk.cbt.errors import HistoryDamaged
from blksnap_ublk.cbt.geometry import Geometry
from blksnap_ublk.cbt.last_change import INDEX_LIMIT

VERSION = 1
FILE = "history.json"
_PART = "history.json.part"
_FORMAT = "blksnap-ublk change history"
_DATA_FILE = re.compile(r"(bitmap|array)\.[1-9][0-9]*", re.ASCII)


class LayerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer: its file, its intervals, and for an array the table of change numbers as runs (first, count)."""

    file: str
    first: int
    last: int
    numbers: tuple[tuple[int, int], ...] | None


class FormerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The generation before this one, and why its history was lost."""

    generation: UUID
    reason: str


class ResizingRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The active bitmap for another size, in bytes, that the process that does the I/O may have begun to mark in."""

    file: str
    size: int


class HistoryRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a history is, except the contents of its bitmaps and arrays."""

    generation: UUID
    size: int
    tracking_block: int
    number: int
    held: tuple[int, ...]
    known_since: int
    reason: str | None
    active: str
    prepared: str | None
    layers: tuple[LayerRecord, ...]
    former: FormerRecord | None = None
    resizing: ResizingRecord | None = None
    grown: tuple[tuple[int, int], ...] = ()

    def files(self) -> list[str]:
        """Names of the data files."""
        prepared = [] if self.prepared is None else [self.prepared]
        resizing = [] if self.resizing is None else [self.resizing.file]
        return [self.active, *prepared, *resizing, *(layer.file for layer in self.layers)]


class _Head(msgspec.Struct):
    format: str
    version: int


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    checksum: str
    history: msgspec.Raw


def write(directory: Path, record: HistoryRecord) -> None:
    """Replace the file. Raises OSError; then the file is as it was."""
    history = msgspec.json.encode(record)
    text = msgspec.json.encode(_Envelope(_FORMAT, VERSION, _checksum(history), msgspec.Raw(history)))
    part = directory / _PART
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)
        os.replace(part, directory / FILE)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read(directory: Path) -> HistoryRecord:
    """Read and check the file. Raises HistoryDamaged, and OSError if the directory cannot be read."""
    path = directory / FILE
    with os.fdopen(mapped_file.open_regular(path, os.O_RDONLY), "rb") as file:
        text = file.read()
    try:
        head = msgspec.json.decode(text, type=_Head)
        if head.format != _FORMAT:
            raise ValueError("not a change history")
        if head.version != VERSION:
            raise ValueError(f"version {head.version} of the format, this program knows {VERSION}")
        envelope = msgspec.json.decode(text, type=_Envelope)
        if envelope.checksum != _checksum(bytes(envelope.history)):
            raise ValueError("the checksum does not match")
        record = msgspec.json.decode(envelope.history, type=HistoryRecord)
        check(record)
    except (ValueError, msgspec.MsgspecError) as error:
        raise HistoryDamaged(f"{path}: {error}") from error
    return record


def sweep(directory: Path, keep: list[str]) -> None:
    """Remove data files that are not in `keep`, and a part left behind. Files of other names are nobody's business."""
    for name in os.listdir(directory):
        if name == _PART or (_DATA_FILE.fullmatch(name) and name not in keep):
            os.unlink(directory / name)


def remove(directory: Path) -> None:
    """Remove the file, then all data files."""
    (directory / FILE).unlink(missing_ok=True)
    sweep(directory, [])


def serial(name: str) -> int:
    """The number in the name of a data file."""
    return int(name.partition(".")[2])


def _checksum(history: bytes) -> str:
    return f"crc32:{zlib.crc32(history):08x}"


def _check_sizes(record: HistoryRecord) -> None:
    """Raise ValueError if the sizes that the device had, and is to have, are not ascending."""
    if record.resizing is not None:
        Geometry(record.resizing.size, record.tracking_block)
    sizes = [size for _, size in record.grown]
    numbers = [number for number, _ in record.grown]
    if sizes != sorted(set(sizes)) or numbers != sorted(set(numbers)):
        raise ValueError("the sizes that the device had are out of order")
    if any(not 0 < size < record.size for size in sizes) or any(not 0 <= each <= record.number for each in numbers):
        raise ValueError("sizes that the device never had")


def check(record: HistoryRecord) -> None:
    """Raise ValueError if a record contradicts itself."""
    Geometry(record.size, record.tracking_block)
    _check_sizes(record)
    files = record.files()
    if not all(_DATA_FILE.fullmatch(name) for name in files) or len(set(files)) != len(files):
        raise ValueError("file names that no history has")
    if not 0 <= record.known_since <= record.number + 1 or (record.reason is None) != (record.known_since == 0):
        raise ValueError("the beginning of the history contradicts itself")
    if any(not 1 <= number <= record.number for number in record.held) or list(record.held) != sorted(set(record.held)):
        raise ValueError("snapshots that were never taken")
    reached = min(record.known_since, record.number)
    for layer in record.layers:
        if layer.first != reached + 1 or layer.last < layer.first:
            raise ValueError("intervals are missing")
        reached = layer.last
        if layer.numbers is None:
            if layer.first != layer.last:
                raise ValueError("a bitmap of several intervals")
            continue
        above, total = layer.first - 1, 0
        for first, count in layer.numbers:
            if first <= above or count < 1:
                raise ValueError("change numbers are out of order")
            above = first + count - 1
            total += count
        if above > record.number or not 1 <= total <= INDEX_LIMIT:
            raise ValueError("change numbers that were never given")
    if reached != record.number:
        raise ValueError("the last intervals are missing")
