# SPDX-License-Identifier: MIT
"""What a device serves: the interface between a device and a target, and the target that keeps nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod

from blksnap_ublk import engine
from blksnap_ublk.ublk.negotiation import DataPath
from blksnap_ublk.ublk.params import PAGE, Attributes, BasicParams, DiscardParams, Params
from blksnap_ublk.ublk.serving import Backend


class Target(ABC):
    """A target whose requests are worked off in C. `begin` and `end` are called once each, in this order."""

    needs_copy: str | None = None
    """Why it cannot use the pages of a request in place; None when it can."""

    @abstractmethod
    def params(self, data_path: DataPath, max_io: int) -> Params:
        """The parameters of a device that serves it; `max_io`: bytes of one request at most. Raises OSError."""

    @abstractmethod
    def begin(self, requests: int, max_io: int) -> Backend:
        """Gets ready to serve up to `requests` requests at once. Raises OSError."""

    @abstractmethod
    def end(self) -> None:
        """Lets go of everything; no queue serves it any more."""


class Null(Target):
    """Forgets what is written and reads as nothing in particular: for measuring."""

    def __init__(self, size: int, *, block: int = 512) -> None:
        """`size` and logical `block` in bytes."""
        self.size = size
        self.block = block
        self._device: engine.Device | None = None

    def params(self, data_path: DataPath, max_io: int) -> Params:
        return Params(
            basic=BasicParams(
                size=self.size,
                logical_block=self.block,
                physical_block=max(self.block, PAGE),
                max_io=max_io,
                attributes=Attributes.VOLATILE_CACHE | Attributes.FUA,
            ),
            discard=DiscardParams(max(self.block, PAGE), max_discard=1 << 30, max_write_zeroes=max_io),
        )

    def begin(self, requests: int, max_io: int) -> Backend:
        self._device = engine.Device(size=self.size, block=self.block, unit=max(self.block, PAGE))
        return Backend(device=self._device)

    def end(self) -> None:
        if self._device is not None:
            self._device.close()
            self._device = None
