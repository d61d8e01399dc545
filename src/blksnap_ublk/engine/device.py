# SPDX-License-Identifier: MIT
"""Devices: filtered, plain (loop) and null."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.file import File
from blksnap_ublk.engine.handle import Handle, Pinned, check, create, pin

if TYPE_CHECKING:
    from blksnap_ublk.engine.image import Image


class Device(Handle):
    """What queues serve. Without an origin a null device; without a bitmap changes are not tracked."""

    _name = "device"

    def __init__(
        self,
        *,
        size: int,
        block: int = 512,
        unit: int = 4096,
        tracking_block: int = 0,
        origin: File | None = None,
        bitmap: Any = None,
        swallowed: Any = None,
        copy_limit_ns: int = 0,
    ) -> None:
        """`block`, `unit`, `tracking_block`: bytes, powers of two, in ascending order.

        `bitmap`: the active bitmap, a bit for each tracking block, whole pages, writable; kept until it was replaced
        and settled, and the images taken before and after it are closed. `swallowed`: a bit for each tracking block, or
        None. `copy_limit_ns`: 0 for 30 s. OSError(EINVAL) where the sizes do not fit each other.
        """
        self.size = size
        self.origin = origin
        self._bitmap = None if bitmap is None else Pinned(bitmap)
        self._swallowed = None if swallowed is None else pin(swallowed)
        self._replaced: list[Pinned] = []
        self._old_swallowed: list[Any] = []
        self._taking: Image | None = None
        config = ffi.new(
            "struct bsu_device_config *",
            {
                "size": size,
                "block": block,
                "unit": unit,
                "tracking_block": tracking_block,
                "origin": ffi.NULL if origin is None else origin.pointer,
                "bitmap": ffi.NULL if self._bitmap is None else self._bitmap.pointer,
                "swallowed": ffi.NULL if self._swallowed is None else self._swallowed,
                "copy_limit_ns": copy_limit_ns,
            },
        )
        super().__init__(create(lib.bsu_device_new, config, what="device"))
        if origin is not None:
            origin.hold()

    def prepare_take(self, image: Image) -> None:
        """First step of a take: what can fail. Followed by `switch_all` and `settle`, or by `cancel`."""
        check(lib.bsu_prepare_take(self.pointer, image.pointer), "preparing to take an image")
        self._taking = image

    def prepare_drop(self, image: Image) -> None:
        """First step of taking an image out."""
        check(lib.bsu_prepare_drop(self.pointer, image.pointer), "preparing to drop an image")

    def begin_drop(self) -> bool:
        """Of a drop that was prepared: nothing is copied for the image any more, also if it is cancelled.

        True: it takes `switch_all`; False: `drop_now` does.
        """
        return bool(lib.bsu_drop_begin(self.pointer))

    def drop_now(self) -> None:
        """Switches a drop that `begin_drop` said needs no gate; `settle` follows."""
        lib.bsu_switch(self.pointer, ffi.NULL)
        self.switched(None)

    def cancel(self) -> None:
        """Undoes a prepare that was not switched."""
        lib.bsu_prepare_cancel(self.pointer)
        self._taking = None

    def mark(self, start: int, length: int) -> None:
        """Forces blocks into the next increment. OSError(EAGAIN) while the gate is closed."""
        check(lib.bsu_device_mark(self.pointer, start, length), "marking blocks as changed")

    def forget_swallowed(self, start: int, length: int) -> None:
        """Trims in a range are not sent any more: it belongs to somebody else now."""
        lib.bsu_device_forget_swallowed(self.pointer, start, length)

    @property
    def waits_for_room(self) -> bool:
        """Whether a write that passed the gate waits for room in a storage."""
        return bool(lib.bsu_device_waits_for_room(self.pointer))

    def resize(self, size: int, bitmap: Any, swallowed: Any, images: Sequence[Image] = (), *, limit_ms: int) -> None:
        """The origin has grown to `size` bytes. `bitmap`, `swallowed`: zeroed, for that size; they get what the former
        ones hold. `images`: those of the device, which keep their size. `settle` follows.

        OSError EINVAL for a smaller size, EBUSY while a change is not settled, ETIMEDOUT when writes in flight do not
        end within `limit_ms`; nothing has changed then.
        """
        pinned, former = Pinned(bitmap), self._swallowed
        if self._bitmap is None or former is None:
            raise OSError(errno.EINVAL, "a device without change tracking does not grow")
        trims = pin(swallowed)
        result = lib.bsu_resize_within(self.pointer, size, pinned.pointer, trims, limit_ms)
        if result < 0:
            pinned.let_go()
            ffi.release(trims)
            check(result, "resizing a device")
        for image in images:
            image.marks_also(pinned)
        self._replaced.append(self._bitmap)
        self._old_swallowed.append(former)
        self._bitmap, self._swallowed, self.size = pinned, trims, size

    def close_gate(self) -> None:
        """Parks the writes that arrive from now on. For tests; `switch_all` does it by itself."""
        lib.bsu_gate_close(self.pointer)

    @property
    def drained(self) -> bool:
        """Whether no write that passed the gate is still in flight."""
        return bool(lib.bsu_gate_drained(self.pointer))

    def open_gate(self) -> None:
        """Lets parked writes go on."""
        lib.bsu_gate_open(self.pointer)

    def switched(self, bitmap: Pinned | None) -> None:
        """Of `switch_all`: `bitmap`, unless None, is the active one now; the former is in use until `settle`."""
        image, self._taking = self._taking, None
        before = self._bitmap
        if bitmap is not None:
            self._bitmap = bitmap
        if image is not None:
            image.marks_in(before, self._bitmap)
        if before is not None and bitmap is not None:
            self._replaced.append(before)

    def settled(self) -> None:
        """Of `settle`: nobody uses the replaced bitmaps any more."""
        while self._replaced:
            self._replaced.pop().let_go()
        while self._old_swallowed:
            ffi.release(self._old_swallowed.pop())

    def _free(self, pointer: Any) -> None:
        check(lib.bsu_device_free(pointer), "closing a device")
        if self.origin is not None:
            self.origin.let_go()
        self.settled()
        if self._bitmap is not None:
            self._bitmap.let_go()
        if self._swallowed is not None:
            ffi.release(self._swallowed)
        self._bitmap = self._swallowed = None
