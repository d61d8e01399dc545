# SPDX-License-Identifier: MIT
"""What a SPEC turned out to be, once it was opened and checked and before anything was allocated."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from blksnap_ublk.errors import NotFound, Unsupported, UsageError
from blksnap_ublk.host import blockdev, stack
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.spec import SECTOR, SectorRange, Spec
from blksnap_ublk.snapshot.storage.areas import AreaKind, Identity
from blksnap_ublk.snapshot.storage.reservation import Reservation


@dataclass(frozen=True)
class Target:
    """An opened file or block device; the fields are those of OpenArea. Sizes in bytes."""

    spec: Spec
    kind: AreaKind
    descriptor: int
    identity: Identity
    size: int
    """What it has now: 0 for an unnamed file."""
    alignment: int
    memory_alignment: int
    direct: bool
    filesystem: str | None
    device: DeviceNumber | None
    publish: bool = False
    """An unnamed file that gets the name `spec.path` once it is allocated."""
    reservation: Reservation | None = None
    """Of a file that is written beneath a filtered device."""
    room: int = 0
    """With `reservation`: what its file system has left."""

    @property
    def grows(self) -> bool:
        """It can be made longer, now and later. What lies beneath a filtered device is reserved whole instead."""
        return self.kind is not AreaKind.DEVICE and self.spec.ranges is None and self.reservation is None

    def byte_ranges(self, size: int) -> list[tuple[int, int]]:
        """The (start, length) in bytes of its areas when it has `size` bytes, before they are cut to alignment.

        Raises UsageError for a range outside of it.
        """
        if self.spec.ranges is None:
            return [(0, size)]
        return [self._bytes_of(each, size) for each in self.spec.ranges]

    def _bytes_of(self, each: SectorRange, size: int) -> tuple[int, int]:
        if each.end * SECTOR > size:
            what = "device" if self.kind is AreaKind.DEVICE else "file"
            text = f"the range {each} lies outside of the {what}, which has {size // SECTOR} sectors"
            raise UsageError(text, subject=self.spec.path)
        return each.start * SECTOR, each.count * SECTOR


def refuse_beneath_off_limits(path: str, identity: Identity, off_limits: Collection[DeviceNumber]) -> None:
    """Raises Unsupported for a file that holds the data of an origin or of a device of ours, through a loop device."""
    for device in off_limits:
        with suppress(NotFound):
            if identity in stack.files_beneath(device):
                text = f"holds the data of {blockdev.node_path(device)}"
                raise Unsupported(text, subject=path, advice="name another file")


def refuse_off_limits(path: str, devices: Collection[DeviceNumber], off_limits: Collection[DeviceNumber]) -> None:
    """Raises Unsupported when one of `devices`, or anything beneath it, is an origin or a device of ours."""
    for device in devices:
        hit = sorted((stack.underlying_devices(device) | {device}) & set(off_limits))
        if hit:
            text = (
                f"lies on {blockdev.node_path(hit[0])}, and storage on the snapshotted device itself, on a filtered"
                " device or on an image is not possible, but in files on a file system directly on a filtered device"
            )
            raise Unsupported(text, subject=path, advice="name storage on another device, or such a file")
