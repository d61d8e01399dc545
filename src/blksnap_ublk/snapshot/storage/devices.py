# SPDX-License-Identifier: MIT
"""Block devices as difference storage."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack

from blksnap_ublk.errors import Busy, Failed, Unsupported
from blksnap_ublk.host import blockdev, holders
from blksnap_ublk.host.claim import open_exclusive
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.storage.areas import AreaKind, Identity
from blksnap_ublk.snapshot.storage.descriptors import DescriptorRegistry
from blksnap_ublk.snapshot.storage.target import Target, refuse_off_limits


def open_device(
    spec: Spec, registry: DescriptorRegistry, closing: ExitStack, off_limits: Collection[DeviceNumber], unit: int
) -> Target:
    """Claims the block device of a SPEC, or shares the claim that this process has. Raises BlksnapError."""
    number = blockdev.device_number(spec.path)
    refuse_off_limits(spec.path, [number], off_limits)
    identity = Identity(number, 0)
    descriptor = registry.acquire(identity, lambda: open_exclusive(spec.path))
    closing.callback(registry.release, identity)
    loops = holders.loops_on(number)  # which claim nothing, and may be mounted
    if loops:
        node = blockdev.node_path(loops[0])
        raise Busy(f"{node} rests on it", subject=spec.path, errno="EBUSY", advice=f"losetup -d {node} first")
    device = blockdev.describe_number(number)
    limits = device.limits
    if limits.zoned != "none":
        raise Unsupported(f"is a zoned device ({limits.zoned})", subject=spec.path, advice="name another device")
    if limits.logical_block > unit:
        text = f"has logical blocks of {limits.logical_block} bytes, more than a unit of {unit}"
        raise Unsupported(text, subject=spec.path, advice="name another device or attach with a larger --unit")
    if device.size == 0:
        raise Failed("the device has no size", subject=spec.path, advice="insert a medium or bind it first")
    return Target(
        spec=spec,
        kind=AreaKind.DEVICE,
        descriptor=descriptor,
        identity=identity,
        size=device.size,
        alignment=limits.logical_block,
        memory_alignment=limits.dma_alignment + 1,
        direct=True,
        filesystem=None,
        device=number,
    )
