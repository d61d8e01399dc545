# SPDX-License-Identifier: MIT
"""The parameters of a device (`struct ublk_params`): its size, blocks, limits and abilities.

All lengths are bytes here. What the driver would refuse cannot be built: a ValueError names the field.
"""

from __future__ import annotations

import enum
import mmap
import struct
from dataclasses import dataclass

SECTOR = 512
PAGE = mmap.PAGESIZE
MIN_SEGMENT = 4096
MAX_BLOCK = 256 << 20
PARAMS_SIZE = 152

_HEADER = struct.Struct("=II")
_BASIC = struct.Struct("=IBBBBIIQQ")
_DISCARD = struct.Struct("=IIIIHH")
_DEVT = struct.Struct("=IIII")
_DMA_ALIGN = struct.Struct("=I4x")
_SEGMENT = struct.Struct("=QIH2x")
_BASIC_AT, _DISCARD_AT, _DEVT_AT, _DMA_ALIGN_AT, _SEGMENT_AT = 8, 40, 60, 108, 120

_TYPE_BASIC, _TYPE_DISCARD, _TYPE_DEVT, _TYPE_DMA_ALIGN, _TYPE_SEGMENT = 1 << 0, 1 << 1, 1 << 2, 1 << 4, 1 << 5


class Attributes(enum.IntFlag):
    """Attributes of the disk (`UBLK_ATTR_*`)."""

    READ_ONLY = 1
    ROTATIONAL = 2
    VOLATILE_CACHE = 4
    """Writes may be lost at a power failure until a flush: the kernel sends flushes."""
    FUA = 8
    """A single write can be asked to be stable when it ends."""


NO_ATTRIBUTES = Attributes(0)


def _power_of_two(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most or value & (value - 1):
        raise ValueError(f"{name}: {value} is not a power of two between {least} and {most}")


def _sectors(name: str, value: int, *, unit: int = SECTOR) -> None:
    if value < 0 or value % unit:
        raise ValueError(f"{name}: {value} is not a multiple of {unit}")
    if value // SECTOR >= 1 << 32:
        raise ValueError(f"{name}: {value} is too large")


@dataclass(frozen=True)
class BasicParams:
    """What every device has.

    `io_opt` 0: nothing preferred. `chunk` 0: none; otherwise no read or write crosses a multiple of it.
    `virt_boundary_mask`: segments of a request end and begin at multiples of one more than it.
    """

    size: int
    logical_block: int = 512
    physical_block: int = 4096
    io_min: int = 0
    io_opt: int = 0
    max_io: int = 512 << 10
    chunk: int = 0
    virt_boundary_mask: int = 0
    attributes: Attributes = NO_ATTRIBUTES

    def __post_init__(self) -> None:
        _power_of_two("logical_block", self.logical_block, SECTOR, PAGE)
        _power_of_two("physical_block", self.physical_block, self.logical_block, MAX_BLOCK)
        for name, value in (("io_min", self.io_min), ("io_opt", self.io_opt)):
            if value:
                _power_of_two(name, value, self.logical_block, MAX_BLOCK)
        if self.size <= 0 or self.size % self.logical_block:
            raise ValueError(f"size: {self.size} is not a positive multiple of the logical block, {self.logical_block}")
        if self.size >= 1 << 63:
            raise ValueError(f"size: {self.size} is more than a block device can have")
        _sectors("max_io", self.max_io, unit=self.logical_block)
        if self.max_io < PAGE:
            raise ValueError(f"max_io: {self.max_io} is less than a page, {PAGE}")
        _sectors("chunk", self.chunk)
        if not 0 <= self.virt_boundary_mask < 1 << 64:
            raise ValueError(f"virt_boundary_mask: {self.virt_boundary_mask} does not fit in 64 bits")
        if Attributes.FUA in self.attributes and Attributes.VOLATILE_CACHE not in self.attributes:
            raise ValueError("attributes: FUA means something only together with VOLATILE_CACHE")


@dataclass(frozen=True)
class DiscardParams:
    """Discard and write-zeroes; a maximum of 0 means that the device does not offer the operation."""

    granularity: int
    max_discard: int = 0
    max_write_zeroes: int = 0
    alignment: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.granularity < 1 << 32:
            raise ValueError(f"granularity: {self.granularity} is not a positive 32-bit number")
        if not 0 <= self.alignment < 1 << 32:
            raise ValueError(f"alignment: {self.alignment} is not a 32-bit number")
        _sectors("max_discard", self.max_discard)
        _sectors("max_write_zeroes", self.max_write_zeroes)


@dataclass(frozen=True)
class SegmentParams:
    """How the pages of a request may be scattered (zero copy: what the origin can take)."""

    max_segments: int
    max_segment_size: int
    boundary_mask: int = (1 << 32) - 1

    def __post_init__(self) -> None:
        if not 1 <= self.max_segments <= 0xFFFF:
            raise ValueError(f"max_segments: {self.max_segments} is not between 1 and 65535")
        if not MIN_SEGMENT <= self.max_segment_size < 1 << 32:
            raise ValueError(f"max_segment_size: {self.max_segment_size} is not between {MIN_SEGMENT} and 4 GiB")
        above = self.boundary_mask + 1
        if above & self.boundary_mask or not MIN_SEGMENT <= above <= 1 << 63:
            raise ValueError(
                f"boundary_mask: {self.boundary_mask:#x} is not one less than a power of two >= {MIN_SEGMENT}"
            )


@dataclass(frozen=True)
class DeviceNumbers:
    """The numbers of `/dev/ublkcN` and, once started, `/dev/ublkbN`: (major, minor) pairs."""

    char: tuple[int, int]
    disk: tuple[int, int]


@dataclass(frozen=True)
class Params:
    """All parameters of a device. `numbers` is filled in by the kernel only.

    `dma_alignment`: a mask, memory of requests is aligned to one more than it; None leaves the kernel's default, 3.
    """

    basic: BasicParams
    discard: DiscardParams | None = None
    dma_alignment: int | None = None
    segment: SegmentParams | None = None
    numbers: DeviceNumbers | None = None

    def __post_init__(self) -> None:
        if self.dma_alignment is not None:
            mask = self.dma_alignment
            if not 0 <= mask < PAGE or mask & (mask + 1):
                raise ValueError(f"dma_alignment: {mask:#x} is not one less than a power of two up to {PAGE}")
        if self.discard and self.discard.granularity % self.basic.logical_block:
            raise ValueError(
                f"granularity: {self.discard.granularity} is not a multiple of the logical block, "
                f"{self.basic.logical_block}"
            )
        if self.segment and self.basic.virt_boundary_mask and self.segment.max_segment_size < 0xFFFFFFFF:
            raise ValueError("max_segment_size: cannot be limited together with virt_boundary_mask")

    def pack(self) -> bytes:
        """The kernel's struct, without `numbers`."""
        types = _TYPE_BASIC
        data = bytearray(PARAMS_SIZE)
        basic = self.basic
        _BASIC.pack_into(
            data,
            _BASIC_AT,
            basic.attributes,
            _shift(basic.logical_block),
            _shift(basic.physical_block),
            _shift(basic.io_opt or basic.physical_block),
            _shift(basic.io_min or basic.physical_block),
            basic.max_io // SECTOR,
            basic.chunk // SECTOR,
            basic.size // SECTOR,
            basic.virt_boundary_mask,
        )
        if self.discard:
            types |= _TYPE_DISCARD
            discard = self.discard
            _DISCARD.pack_into(
                data,
                _DISCARD_AT,
                discard.alignment,
                discard.granularity,
                discard.max_discard // SECTOR,
                discard.max_write_zeroes // SECTOR,
                1 if discard.max_discard else 0,
                0,
            )
        if self.dma_alignment is not None:
            types |= _TYPE_DMA_ALIGN
            _DMA_ALIGN.pack_into(data, _DMA_ALIGN_AT, self.dma_alignment)
        if self.segment:
            types |= _TYPE_SEGMENT
            segment = self.segment
            _SEGMENT.pack_into(data, _SEGMENT_AT, segment.boundary_mask, segment.max_segment_size, segment.max_segments)
        _HEADER.pack_into(data, 0, PARAMS_SIZE, types)
        return bytes(data)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Params:
        """From the kernel's struct; types that this kernel or we do not know are left out."""
        _, types = _HEADER.unpack_from(data)
        attributes, logical, physical, io_opt, io_min, max_io, chunk, size, boundary = _BASIC.unpack_from(
            data, _BASIC_AT
        )
        discard = segment = numbers = dma_alignment = None
        if types & _TYPE_DISCARD:
            alignment, granularity, max_discard, max_zeroes, _, _ = _DISCARD.unpack_from(data, _DISCARD_AT)
            discard = DiscardParams(granularity, max_discard * SECTOR, max_zeroes * SECTOR, alignment)
        if types & _TYPE_DMA_ALIGN:
            (dma_alignment,) = _DMA_ALIGN.unpack_from(data, _DMA_ALIGN_AT)
        if types & _TYPE_SEGMENT:
            mask, segment_size, segments = _SEGMENT.unpack_from(data, _SEGMENT_AT)
            segment = SegmentParams(segments, segment_size, mask)
        if types & _TYPE_DEVT:
            char_major, char_minor, disk_major, disk_minor = _DEVT.unpack_from(data, _DEVT_AT)
            numbers = DeviceNumbers((char_major, char_minor), (disk_major, disk_minor))
        basic = BasicParams(
            size=size * SECTOR,
            logical_block=1 << logical,
            physical_block=1 << physical,
            io_min=1 << io_min if io_min >= logical else 0,
            io_opt=1 << io_opt if io_opt >= logical else 0,
            max_io=max_io * SECTOR,
            chunk=chunk * SECTOR,
            virt_boundary_mask=boundary,
            attributes=Attributes(attributes),
        )
        return cls(basic, discard, dma_alignment, segment, numbers)


def _shift(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1
