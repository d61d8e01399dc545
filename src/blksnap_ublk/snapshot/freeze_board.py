# SPDX-License-Identifier: MIT
"""The memory that the control process, the freezer and its watchdog share: how far each file system has come.

It outlives each of them, so that whoever is left knows what to thaw. Each byte has one writer.
Only the standard library is imported: helper processes use this.
"""

from __future__ import annotations

import enum
import mmap
import os

_REASON = 0
_FIRST = 16  # then two bytes for each file system: its stage, and whether the watchdog has done with it
_STEP = 2


class Stage(enum.IntEnum):
    """Written by the freezer."""

    IDLE = 0
    FREEZING = 1
    """FIFREEZE is about to be called, under way, or has just returned."""
    FROZEN = 2
    FAILED = 3
    """Not frozen, or frozen by somebody else."""
    THAWED = 4


class Reason(enum.IntEnum):
    """Why the watchdog has stepped in."""

    NONE = 0
    CONTROL_GONE = 1
    LIMIT = 2
    FREEZER_GONE = 3


class Board:
    """The board in an anonymous shared file of `Board.create`, for `count` file systems."""

    def __init__(self, descriptor: int, count: int) -> None:
        self._memory = mmap.mmap(descriptor, _size(count))
        self.count = count

    @staticmethod
    def create(count: int) -> int:
        """A descriptor of an empty board. Raises OSError."""
        descriptor = os.memfd_create("freeze-board", os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, _size(count))
        return descriptor

    def close(self) -> None:
        """Gives the mapping back."""
        self._memory.close()

    def stage(self, n: int) -> Stage:
        """What the freezer said last of the n-th file system."""
        return Stage(self._memory[_FIRST + _STEP * n])

    def set_stage(self, n: int, stage: Stage) -> None:
        """By the freezer only."""
        self._memory[_FIRST + _STEP * n] = stage

    def is_settled(self, n: int) -> bool:
        """Whether the watchdog has done with the n-th file system: thawed it, or found it not to be frozen."""
        return bool(self._memory[_FIRST + _STEP * n + 1])

    def settle(self, n: int) -> None:
        """By the watchdog only."""
        self._memory[_FIRST + _STEP * n + 1] = 1

    @property
    def reason(self) -> Reason:
        """NONE as long as the watchdog has not stepped in."""
        return Reason(self._memory[_REASON])

    @reason.setter
    def reason(self, reason: Reason) -> None:
        self._memory[_REASON] = reason

    @property
    def has_begun(self) -> bool:
        """Whether anything may be frozen or may have been."""
        return any(self.stage(n) is not Stage.IDLE for n in range(self.count))

    def to_thaw(self) -> list[int]:
        """What is or may be frozen by the freezer: lowest first, but the one whose freezing is under way last."""
        open_ones = [n for n in reversed(range(self.count)) if not self.is_settled(n)]
        return [n for stage in (Stage.FROZEN, Stage.FREEZING) for n in open_ones if self.stage(n) is stage]


def _size(count: int) -> int:
    return -(-(_FIRST + _STEP * count) // mmap.PAGESIZE) * mmap.PAGESIZE
