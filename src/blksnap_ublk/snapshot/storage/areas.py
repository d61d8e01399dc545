# SPDX-License-Identifier: MIT
"""Opened areas of difference storage, and what undoes their opening."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol

from blksnap_ublk.host.number import DeviceNumber


class AreaKind(enum.StrEnum):
    """What an area lies in."""

    FILE = "file"
    UNNAMED = "unnamed"
    DEVICE = "device"


class Identity(NamedTuple):
    """A file by its file system's device number and inode, or a block device: its number and inode 0."""

    device: DeviceNumber
    inode: int


class UsedRange(NamedTuple):
    """A byte range of a file or a block device that belongs to a difference storage."""

    identity: Identity
    start: int
    length: int

    def overlaps(self, other: UsedRange) -> bool:
        return (
            self.identity == other.identity
            and self.start < other.start + other.length
            and other.start < self.start + self.length
        )


@dataclass(frozen=True)
class OpenArea:
    """An area ready for I/O: all of it exists and has space of its own.

    `start_byte` and `length` are multiples of `alignment`, all in bytes. The descriptor may be shared with other areas.
    """

    path: str
    """As the user named it; the directory of an unnamed file."""
    fd: int
    start_byte: int
    length: int
    kind: AreaKind
    alignment: int
    """Of offset and length of an I/O."""
    memory_alignment: int
    """Of the buffer of an I/O."""
    direct: bool
    """Opened with O_DIRECT; without it (tmpfs of old kernels) I/O goes through the page cache."""
    written: bool
    """Writing changes no metadata. Where it is False, `write_ahead` makes it so for a range."""
    filesystem: str | None
    """Type of the file system; None for a block device."""
    device: DeviceNumber | None
    """The block device, or the one the file system lies on; None for a file system that has none."""
    identity: Identity
    beneath: str | None = None
    """The key of the filtered device that it is written beneath, at byte `physical` of its origin, not through `fd`."""
    physical: int | None = None
    former_size: int | None = None
    """Bytes that its file had before; -1 for one that was made and has a name; None: no file, or one without a name."""

    @property
    def used_range(self) -> UsedRange:
        return UsedRange(self.identity, self.start_byte, self.length)


@dataclass(frozen=True)
class Planned:
    """A file that is about to be changed: it has `former_size` bytes, -1: it has no name yet, and is to have `size`.

    `beneath`: the key of the filtered device beneath which it is to be written.
    """

    path: str
    identity: Identity
    former_size: int
    size: int
    beneath: str | None


class Reservation(Protocol):
    """A file that a helper process holds for this one, and gives back unless it is to be kept."""

    def keep(self) -> None: ...


class OpenAreas:
    """The areas of one call, in the order of the SPECs. As a context manager: closed, or undone after an exception."""

    def __init__(
        self,
        areas: tuple[OpenArea, ...],
        notes: tuple[str, ...],
        closing: ExitStack,
        undoing: ExitStack,
        reservations: Sequence[Reservation] = (),
    ) -> None:
        self.areas = areas
        self.notes = notes
        """What the user should know, one line each."""
        self._closing = closing
        self._undoing = undoing
        self._reservations = reservations

    @property
    def capacity(self) -> int:
        """Bytes in all areas together."""
        return sum(area.length for area in self.areas)

    def keep(self) -> None:
        """What helper processes have reserved stays so if this process dies from now on. Raises BlksnapError."""
        for reservation in self._reservations:
            reservation.keep()

    def close(self) -> None:
        """Gives the descriptors back: unnamed files are gone with the last one. What was allocated stays."""
        self._undoing.pop_all()
        self._closing.close()

    def undo(self) -> None:
        """Gives back also what was created, allocated or changed for these areas."""
        try:
            self._undoing.close()
        finally:
            self._closing.close()

    def __enter__(self) -> OpenAreas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.undo()
