# SPDX-License-Identifier: MIT
"""What a former process left is checked, and what it did not use is free."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from blksnap_ublk.engine._engine import ffi, lib
from blksnap_ublk.engine.handle import Handle, check, create
from blksnap_ublk.engine.image import Image
from blksnap_ublk.engine.storage import Arena, Storage


class Sweep(Handle):
    """Checks adopted maps against their records, in portions. Images that do not fit are broken (EBADMSG)."""

    _name = "sweep"

    def __init__(
        self, arena: Arena, storages: Sequence[Storage], images: Sequence[Image], *, lost: Sequence[int] = ()
    ) -> None:
        """All `storages` and `images` that were adopted; `lost`: serials of images that could not be."""
        numbers = ffi.new("uint32_t[]", list(lost))
        super().__init__(create(lib.bsu_sweep_new, arena.pointer, numbers, len(lost), what="sweep"))
        self._parts: list[Any] = [arena.hold()]
        try:
            for storage in storages:
                check(lib.bsu_sweep_add_storage(self.pointer, storage.pointer), "sweep")
                self._parts.append(storage.hold())
            for image in images:
                check(lib.bsu_sweep_add_image(self.pointer, image.pointer), "sweep")
                self._parts.append(image.hold())
        except OSError:
            self.close()
            raise

    def run(self, seconds: float = 60.0) -> bool:
        """Goes on for so long, but for one portion at least; whether it has come to its end."""
        end = time.monotonic() + seconds
        while lib.bsu_sweep_step(self.pointer):
            if time.monotonic() > end:
                return False
        return True

    def _free(self, pointer: Any) -> None:
        lib.bsu_sweep_free(pointer)
        while self._parts:
            self._parts.pop().let_go()
