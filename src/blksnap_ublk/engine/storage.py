# SPDX-License-Identifier: MIT
"""Memory of maps, and difference storage."""

from __future__ import annotations

from typing import Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.file import File
from blksnap_ublk.engine.handle import Handle, check, create, pin

ARENA_PORTION: int = lib.BSU_ARENA_PORTION
"""Bytes of a portion of map memory."""

STORAGE_STATE_BYTES: int = lib.bsu_storage_state_bytes()
"""Bytes of a storage's shared state."""


class Arena(Handle):
    """Map memory, given in portions; shared by the maps of all images."""

    _name = "arena"

    def __init__(self) -> None:
        pointer = lib.bsu_arena_new()
        if pointer == ffi.NULL:
            raise MemoryError("arena")
        super().__init__(pointer)
        self._memory: list[Any] = []

    def add(self, memory: Any, *, adopt: bool = False) -> None:
        """Adds a portion: exactly ARENA_PORTION zeroed bytes, writable, page aligned (an mmap). Kept until close.

        With `adopt` it holds maps of a former process: to be added in their order, before any other (OSError EBUSY).
        """
        pinned = pin(memory)
        if len(pinned) != ARENA_PORTION:
            ffi.release(pinned)
            raise ValueError(f"a portion of map memory has {ARENA_PORTION} bytes, not {len(pinned)}")
        try:
            check((lib.bsu_arena_adopt if adopt else lib.bsu_arena_add)(self.pointer, pinned), "map memory")
        except OSError:
            ffi.release(pinned)
            raise
        self._memory.append(pinned)

    @property
    def total(self) -> int:
        """Bytes given so far."""
        return int(lib.bsu_arena_bytes(self.pointer))

    @property
    def free(self) -> int:
        """Bytes not used by maps."""
        return int(lib.bsu_arena_free_bytes(self.pointer))

    def _free(self, pointer: Any) -> None:
        lib.bsu_arena_free(pointer)
        while self._memory:
            ffi.release(self._memory.pop())


class Storage(Handle):
    """An ordered list of areas that preserved units are kept in. To be closed after its images and before its files."""

    _name = "storage"

    def __init__(self, state: Any, *, unit: int = 4096, number: int = 0, adopt: bool = False) -> None:
        """`state`: STORAGE_STATE_BYTES zeroed, writable bytes, shared with whoever watches; kept until close.

        `number` tells it from other storages, after a death too.
        With `adopt` it is what a former process left, and so are the records of the areas that are added: what that one
        gave out is in quarantine. OSError(EBADMSG) when it does not fit.
        """
        pinned = pin(state)
        if len(pinned) < STORAGE_STATE_BYTES:
            ffi.release(pinned)
            raise ValueError(f"the state of a storage has {STORAGE_STATE_BYTES} bytes, not {len(pinned)}")
        config = ffi.new(
            "struct bsu_storage_config *", {"unit": unit, "number": number, "state": pinned, "adopt": adopt}
        )
        try:
            pointer = create(lib.bsu_storage_new, config, what="difference storage")
        except OSError:
            ffi.release(pinned)
            raise
        super().__init__(pointer)
        self._memory = [pinned]
        self._files: list[File] = []

    def records_bytes(self, length: int) -> int:
        """Bytes of the records of an area of `length` bytes."""
        return int(lib.bsu_storage_records_bytes(self.pointer, length))

    def add_area(self, file: File, offset: int, length: int, records: Any) -> None:
        """Appends an area. `records`: records_bytes(length) zeroed, writable bytes; kept until close.

        OSError EINVAL when it is smaller than a unit, ENOSPC when there is no room for another area.
        """
        pinned = pin(records)
        try:
            if len(pinned) < self.records_bytes(length):
                raise ValueError(f"records: {len(pinned)} bytes, {self.records_bytes(length)} are needed")
            check(lib.bsu_storage_add_area(self.pointer, file.pointer, offset, length, pinned), "area")
        except (OSError, ValueError):
            ffi.release(pinned)
            raise
        self._memory.append(pinned)
        self._files.append(file.hold())

    def set_room(self, *, wait_ms: int, low: int) -> None:
        """What happens when it is full: writers wait for room so long, then what lacks their units overflows.

        With 0 at once, also for those that wait now. `low`: bytes; the process is notified, once, when less is free.
        """
        lib.bsu_storage_set_room(self.pointer, wait_ms * 1_000_000, low)

    def set_rate(self, rate: int) -> None:
        """Copies may fill it with so many bytes a second, 0 for no limit; writers wait their turn."""
        lib.bsu_storage_set_rate(self.pointer, rate)

    def end_quarantine(self) -> None:
        """The I/O of former processes has ended, and the sweep: places that no map holds are free."""
        while lib.bsu_storage_end_quarantine(self.pointer):
            pass

    @property
    def capacity(self) -> int:
        """Bytes of all areas."""
        return int(lib.bsu_storage_capacity(self.pointer))

    @property
    def used(self) -> int:
        """Bytes given out."""
        return int(lib.bsu_storage_used(self.pointer))

    def area_used(self, area: int) -> int:
        """Bytes given out of the area with that index."""
        return int(lib.bsu_storage_area_used(self.pointer, area))

    def _free(self, pointer: Any) -> None:
        lib.bsu_storage_free(pointer)
        while self._files:
            self._files.pop().let_go()
        while self._memory:
            ffi.release(self._memory.pop())
