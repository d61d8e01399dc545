# SPDX-License-Identifier: MIT
"""Images: a device as it was at an instant."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.device import Device
from blksnap_ublk.engine.handle import Handle, Pinned, check, create, pin
from blksnap_ublk.engine.storage import Arena, Storage


class ImageStatus(enum.IntEnum):
    """Whether an image can be trusted."""

    ACTIVE = lib.BSU_IMAGE_ACTIVE
    OVERFLOWN = lib.BSU_IMAGE_OVERFLOWN
    CORRUPTED = lib.BSU_IMAGE_CORRUPTED
    GONE = lib.BSU_IMAGE_GONE


@dataclass(frozen=True)
class Adopted:
    """An image that a former process had: its size in bytes, and the bitmaps before and after it, where writes to it
    are marked; none for one that is not served any more. They are kept until it is closed."""

    size: int
    bitmaps: tuple[Any, Any] | None = None


class Image(Handle):
    """One image of a device. It shows nothing before it was taken; it can be closed when it was dropped and settled."""

    _name = "image"

    def __init__(
        self, device: Device, storage: Storage, arena: Arena, state: Any, *, serial: int, adopt: Adopted | None = None
    ) -> None:
        """`state`: state_bytes() zeroed, writable bytes, shared with whoever watches; kept until close.

        `serial`: 1 to 2^24 - 1, names the map in the records of the storage. With `adopt` the state is what a former
        process left; the image is the youngest of its device then, which has no queue yet (OSError EBUSY). OSError
        EBADMSG when the state does not fit.
        """
        pinned = pin(state)
        self._state = pinned
        config = ffi.new(
            "struct bsu_image_config *",
            {
                "device": device.pointer,
                "storage": storage.pointer,
                "arena": arena.pointer,
                "state": pinned,
                "serial": serial,
            },
        )
        self._bitmaps = [Pinned(bitmap) for bitmap in (adopt.bitmaps or () if adopt is not None else ())]
        try:
            super().__init__(self._adopt(config, adopt) if adopt else create(lib.bsu_image_new, config, what="image"))
        except OSError:
            self._release()
            raise
        self.device = device
        self._parts = (storage.hold(), arena.hold())

    def _adopt(self, config: Any, adopt: Adopted) -> Any:
        before, after = (bitmap.pointer for bitmap in self._bitmaps) if self._bitmaps else (ffi.NULL, ffi.NULL)
        error = ffi.new("int *")
        pointer = lib.bsu_image_adopt(config, adopt.size, before, after, error)
        if pointer == ffi.NULL:
            check(error[0], "adopting an image")
        return pointer

    def _release(self) -> None:
        ffi.release(self._state)
        while self._bitmaps:
            self._bitmaps.pop().let_go()

    @staticmethod
    def state_bytes(size: int, unit: int = 4096) -> int:
        """Bytes of the shared state of an image of a device of `size` bytes."""
        return int(lib.bsu_image_state_bytes(size, unit))

    @property
    def status(self) -> tuple[ImageStatus, int]:
        """The status, and the errno that broke it (0 while active)."""
        error = ffi.new("int *")
        status = ImageStatus(lib.bsu_image_status(self.pointer, error))
        return status, int(error[0])

    def break_(self, status: ImageStatus, error: int) -> None:
        """Marks it as broken, `error` being an errno; the first reason stays."""
        lib.bsu_image_break(self.pointer, status, error)

    def exempt(self, start: int, length: int) -> None:
        """Before it is taken: these bytes, whole units, read as zeroes and are never preserved for it.

        OSError EINVAL for anything else, ENOMEM when map memory is used up: add some, call it again.
        """
        check(lib.bsu_image_exempt(self.pointer, start, length), "exempting a range of an image")

    def marks_in(self, before: Pinned | None, after: Pinned | None) -> None:
        """Of a take: the bitmaps that writes to the image are marked in, kept until it is closed."""
        self._bitmaps = [each.hold() for each in (before, after) if each is not None]

    def marks_also(self, bitmap: Pinned) -> None:
        """Of a resize: `bitmap` may be one that writes to the image are marked in."""
        self._bitmaps.append(bitmap.hold())

    def release(self, *, timeout_ms: int = 10_000) -> None:
        """After it was dropped and settled: gives its places and map memory back. `close` does the rest of it.

        OSError(ETIMEDOUT) when it is still read from then, or is very large: call it again, it goes on where it was.
        """
        check(lib.bsu_image_release_within(self.pointer, timeout_ms), "giving back what an image has")

    @property
    def written(self) -> int:
        """Bytes written to the image itself, whole units."""
        return int(lib.bsu_image_written(self.pointer))

    @property
    def preserved(self) -> int:
        """Bytes preserved for it."""
        return int(lib.bsu_image_preserved(self.pointer))

    @property
    def idle(self) -> bool:
        """Whether no queue or I/O refers to it."""
        return bool(lib.bsu_image_idle(self.pointer))

    def _free(self, pointer: Any) -> None:
        check(lib.bsu_image_free(pointer), "closing an image")
        self._release()
        for part in self._parts:
            part.let_go()
