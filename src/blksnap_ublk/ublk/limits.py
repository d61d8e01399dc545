# SPDX-License-Identifier: MIT
"""The parameters of a ublk device that stands for something else: a block device or a file."""

from __future__ import annotations

import errno
import os

from blksnap_ublk.host.blockdev import BlockLimits
from blksnap_ublk.ublk.negotiation import DataPath
from blksnap_ublk.ublk.params import (
    MAX_BLOCK,
    MIN_SEGMENT,
    PAGE,
    SECTOR,
    Attributes,
    BasicParams,
    DiscardParams,
    Params,
    SegmentParams,
)

DEFAULT_MAX_IO = 512 << 10
LEAST_DISCARD_KERNEL = (6, 12)
"""Before it io_uring had no discard; punching a hole in a block device writes zeroes instead."""


def kernel_version() -> tuple[int, int]:
    """Of the running kernel: (6, 12)."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()))


def refuse_unservable(limits: BlockLimits, name: str) -> None:
    """Raises OSError(EOPNOTSUPP) for an origin that no ublk device can stand for; the text says why."""
    if limits.zoned != "none":
        raise OSError(errno.EOPNOTSUPP, f"{name}: a zoned device ({limits.zoned}) cannot be served")
    if limits.logical_block > PAGE:
        raise OSError(
            errno.EOPNOTSUPP,
            f"{name}: logical blocks of {limits.logical_block} bytes, more than a page ({PAGE}), cannot be served",
        )


def needs_copy(limits: BlockLimits) -> str | None:
    """Why the pages of a request cannot be used in I/O of this origin; None when they can."""
    if limits.stable_writes:
        return "the origin needs pages that do not change during a write (queue/stable_writes)"
    if limits.integrity is not None:
        return f"the origin checks the integrity of pages ({limits.integrity})"
    return None


def params_of_block_device(
    limits: BlockLimits,
    size: int,
    *,
    data_path: DataPath,
    max_io: int = DEFAULT_MAX_IO,
    read_only: bool = False,
    kernel: tuple[int, int] | None = None,
) -> Params:
    """Parameters for a device of `size` bytes whose I/O goes to a block device with these limits.

    `max_io`: bytes of a request at most, what ADD_DEV granted. Raises as `refuse_unservable`.
    """
    refuse_unservable(limits, "the origin")
    can_discard = limits.discard_max > 0 and (kernel or kernel_version()) >= LEAST_DISCARD_KERNEL
    zero_copy = data_path is DataPath.ZERO_COPY
    return Params(
        basic=_basic(limits, size, max_io, read_only, zero_copy=zero_copy),
        discard=None if read_only else _discard(limits, max_io, can_discard=can_discard),
        dma_alignment=_dma_alignment(limits) if zero_copy else None,
        segment=_segment(limits) if zero_copy else None,
    )


def params_of_file(
    size: int, block: int, *, data_path: DataPath, max_io: int = DEFAULT_MAX_IO, read_only: bool = False
) -> Params:
    """Parameters for a device of `size` bytes in a file; `block`: what offsets of its I/O must be multiples of."""
    max_io = max(_round_down(max_io, block), PAGE)
    physical = max(block, 4096)
    return Params(
        basic=BasicParams(
            size=size,
            logical_block=block,
            physical_block=physical,
            max_io=max_io,
            attributes=_attributes(read_only=read_only, rotational=False),
        ),
        discard=None if read_only else DiscardParams(physical, max_discard=1 << 30, max_write_zeroes=max_io),
        dma_alignment=block - 1 if data_path is DataPath.ZERO_COPY else None,
    )


def _attributes(*, read_only: bool, rotational: bool) -> Attributes:
    # A cache is always declared: only then the kernel sends flushes, which are passed down, needed there or not.
    found = Attributes.VOLATILE_CACHE | Attributes.FUA
    if read_only:
        found |= Attributes.READ_ONLY
    if rotational:
        found |= Attributes.ROTATIONAL
    return found


def _basic(limits: BlockLimits, size: int, max_io: int, read_only: bool, *, zero_copy: bool) -> BasicParams:
    logical = limits.logical_block
    physical = limits.physical_block if _is_power(limits.physical_block) else logical
    if limits.max_sectors:
        max_io = min(max_io, limits.max_sectors * SECTOR)
    return BasicParams(
        size=_round_down(size, logical),
        logical_block=logical,
        physical_block=min(max(physical, logical), MAX_BLOCK),
        io_min=_power_or_none(limits.io_min, logical),
        io_opt=_power_or_none(limits.io_opt, logical),
        max_io=max(_round_down(max_io, max(logical, SECTOR)), PAGE),
        virt_boundary_mask=limits.virt_boundary_mask if zero_copy else 0,
        attributes=_attributes(read_only=read_only, rotational=limits.rotational),
    )


def _discard(limits: BlockLimits, max_io: int, *, can_discard: bool) -> DiscardParams:
    block = limits.logical_block
    if limits.max_sectors:
        max_io = min(max_io, limits.max_sectors * SECTOR)
    zeroes = max(_round_down(max_io, block), PAGE)
    if not can_discard:
        return DiscardParams(granularity=block, max_write_zeroes=zeroes)
    granularity = max(limits.discard_granularity, block)
    granularity = _round_down(granularity, block)
    return DiscardParams(
        granularity=granularity,
        alignment=limits.discard_alignment % granularity,
        max_discard=max(_round_down(min(limits.discard_max, 1 << 40), block), block),
        max_write_zeroes=zeroes,
    )


def _dma_alignment(limits: BlockLimits) -> int:
    mask = max(limits.dma_alignment, 3)
    return min((1 << mask.bit_length()) - 1, PAGE - 1)


def _segment(limits: BlockLimits) -> SegmentParams | None:
    if not limits.max_segments or limits.virt_boundary_mask:
        return None
    return SegmentParams(
        max_segments=min(limits.max_segments, 0xFFFF),
        max_segment_size=min(max(limits.max_segment_size, MIN_SEGMENT), 0xFFFFFFFF),
    )


def _is_power(value: int) -> bool:
    return value > 0 and not value & (value - 1)


def _power_or_none(value: int, least: int) -> int:
    return value if _is_power(value) and least <= value <= MAX_BLOCK else 0


def _round_down(value: int, unit: int) -> int:
    return value - value % unit
