# SPDX-License-Identifier: MIT
"""The limits of a device follow from those of what it stands for."""

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.host.blockdev import BlockLimits
from blksnap_ublk.ublk.limits import needs_copy, params_of_block_device, params_of_file
from blksnap_ublk.ublk.negotiation import DataPath
from blksnap_ublk.ublk.params import PAGE, Attributes, Params

NVME = BlockLimits(
    logical_block=512,
    physical_block=4096,
    io_min=4096,
    io_opt=0,
    max_sectors=256,
    max_hw_sectors=2048,
    chunk_sectors=0,
    max_segments=127,
    max_segment_size=4294967295,
    virt_boundary_mask=4095,
    dma_alignment=3,
    discard_granularity=512,
    discard_alignment=0,
    discard_max=2199023255040,
    write_zeroes_max=0,
    rotational=False,
    write_cache=True,
    fua=True,
    stable_writes=False,
    integrity=None,
    inline_crypto=False,
    zoned="none",
)
DISK = replace(
    NVME,
    logical_block=512,
    physical_block=512,
    max_sectors=2560,
    max_segments=168,
    max_segment_size=65536,
    virt_boundary_mask=0,
    dma_alignment=511,
    discard_granularity=0,
    discard_max=0,
    rotational=True,
)
MODERN = (7, 3)


def of(limits: BlockLimits, path: DataPath = DataPath.COPY, kernel: tuple[int, int] = MODERN) -> Params:
    return params_of_block_device(limits, 1 << 30, data_path=path, kernel=kernel)


def test_a_cache_is_always_declared() -> None:
    attributes = of(replace(DISK, write_cache=False, fua=False)).basic.attributes
    assert Attributes.VOLATILE_CACHE | Attributes.FUA in attributes
    assert Attributes.ROTATIONAL in attributes
    assert Attributes.ROTATIONAL not in of(NVME).basic.attributes


def test_write_zeroes_is_always_offered_and_as_large_as_a_request() -> None:
    for limits in (NVME, DISK):
        params = of(limits)
        assert params.discard is not None
        assert params.discard.max_write_zeroes == params.basic.max_io


def test_discard_is_offered_where_the_origin_and_io_uring_have_it() -> None:
    cases = [(of(NVME), True), (of(NVME, kernel=(6, 11)), False), (of(DISK), False)]
    for params, offered in cases:
        assert params.discard is not None
        assert (params.discard.max_discard > 0) == offered


def test_requests_are_no_larger_than_those_of_the_origin() -> None:
    assert of(NVME).basic.max_io == 256 * 512
    assert params_of_block_device(DISK, 1 << 30, data_path=DataPath.COPY, max_io=64 << 10).basic.max_io == 64 << 10


def test_zero_copy_takes_over_what_pages_must_look_like() -> None:
    nvme, disk = of(NVME, DataPath.ZERO_COPY), of(DISK, DataPath.ZERO_COPY)
    assert (nvme.dma_alignment, nvme.basic.virt_boundary_mask, nvme.segment) == (3, 4095, None)
    assert disk.dma_alignment == 511
    assert disk.segment is not None
    assert (disk.segment.max_segments, disk.segment.max_segment_size) == (168, 65536)
    copied = of(DISK)
    assert (copied.dma_alignment, copied.segment, copied.basic.virt_boundary_mask) == (None, None, 0)


def test_origins_that_need_stable_pages_are_copied() -> None:
    assert needs_copy(NVME) is None
    assert "stable" in (needs_copy(replace(NVME, stable_writes=True)) or "")
    assert "T10" in (needs_copy(replace(NVME, integrity="T10-DIF-TYPE1-CRC")) or "")


@pytest.mark.parametrize("limits", [replace(NVME, zoned="host-managed"), replace(NVME, logical_block=4 * PAGE)])
def test_origins_that_cannot_be_served(limits: BlockLimits) -> None:
    with pytest.raises(OSError, match="cannot be served") as raised:
        of(limits)
    assert raised.value.errno == errno.EOPNOTSUPP


@given(
    logical=st.sampled_from([512, 4096]),
    physical=st.sampled_from([512, 4096, 16384, 3 << 10]),
    io_min=st.integers(0, 1 << 22),
    io_opt=st.integers(0, 1 << 30),
    max_sectors=st.integers(0, 1 << 16),
    max_segments=st.integers(0, 1 << 17),
    segment_size=st.integers(0, (1 << 32) - 1),
    virt_boundary=st.sampled_from([0, 511, 4095]),
    dma=st.integers(0, 4095),
    granularity=st.integers(0, 1 << 24),
    alignment=st.integers(0, 1 << 20),
    discard_max=st.integers(0, 1 << 45),
    size=st.integers(4096, 1 << 50),
    path=st.sampled_from([DataPath.COPY, DataPath.ZERO_COPY]),
)
def test_whatever_an_origin_says_the_parameters_are_possible(
    logical: int,
    physical: int,
    io_min: int,
    io_opt: int,
    max_sectors: int,
    max_segments: int,
    segment_size: int,
    virt_boundary: int,
    dma: int,
    granularity: int,
    alignment: int,
    discard_max: int,
    size: int,
    path: DataPath,
) -> None:
    limits = replace(
        NVME,
        logical_block=logical,
        physical_block=physical,
        io_min=io_min,
        io_opt=io_opt,
        max_sectors=max_sectors,
        max_segments=max_segments,
        max_segment_size=segment_size,
        virt_boundary_mask=virt_boundary,
        dma_alignment=dma,
        discard_granularity=granularity,
        discard_alignment=alignment,
        discard_max=discard_max,
    )
    params = params_of_block_device(limits, size, data_path=path, kernel=MODERN)
    assert Params.unpack(params.pack()).basic.size == size - size % logical


@given(st.integers(1, 1 << 40), st.sampled_from([512, 4096]), st.booleans())
def test_files(blocks: int, block: int, read_only: bool) -> None:
    params = params_of_file(blocks * block, block, data_path=DataPath.ZERO_COPY, read_only=read_only)
    assert params.basic.logical_block == block
    assert (Attributes.READ_ONLY in params.basic.attributes) == read_only
    assert (params.discard is None) == read_only
    params.pack()
