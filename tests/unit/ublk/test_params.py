# SPDX-License-Identifier: MIT
"""Parameters survive the way into the kernel's struct and back, and impossible ones cannot be built."""

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.ublk.device_info import DeviceInfo, DeviceState
from blksnap_ublk.ublk.features import Features
from blksnap_ublk.ublk.params import (
    PAGE,
    PARAMS_SIZE,
    Attributes,
    BasicParams,
    DiscardParams,
    Params,
    SegmentParams,
)

BLOCKS = [512, 1024, 2048, 4096]


@st.composite
def basics(draw: st.DrawFn) -> BasicParams:
    logical = draw(st.sampled_from(BLOCKS))
    physical = logical << draw(st.integers(0, 4))
    return BasicParams(
        size=draw(st.integers(1, 1 << 40)) * logical,
        logical_block=logical,
        physical_block=physical,
        io_min=physical << draw(st.integers(0, 4)),
        io_opt=physical << draw(st.integers(0, 4)),
        max_io=PAGE * draw(st.integers(1, 8192)),
        chunk=512 * draw(st.integers(0, 1 << 20)),
        attributes=draw(
            st.sampled_from(
                [
                    Attributes(0),
                    Attributes.READ_ONLY,
                    Attributes.VOLATILE_CACHE,
                    Attributes.VOLATILE_CACHE | Attributes.FUA,
                    Attributes.ROTATIONAL | Attributes.VOLATILE_CACHE,
                ]
            )
        ),
    )


@st.composite
def all_params(draw: st.DrawFn) -> Params:
    basic = draw(basics())
    discards = st.builds(
        DiscardParams,
        granularity=st.integers(1, 64).map(lambda n: n * basic.logical_block),
        max_discard=st.integers(0, 1 << 30).map(lambda n: n * 512),
        max_write_zeroes=st.integers(0, 1 << 30).map(lambda n: n * 512),
        alignment=st.integers(0, 1 << 31),
    )
    segments = st.builds(
        SegmentParams,
        max_segments=st.integers(1, 65535),
        max_segment_size=st.integers(4096, (1 << 32) - 1),
        boundary_mask=st.integers(12, 63).map(lambda n: (1 << n) - 1),
    )
    return Params(
        basic=basic,
        discard=draw(st.none() | discards),
        dma_alignment=draw(st.none() | st.sampled_from([0, 3, 511, 4095])),
        segment=draw(st.none() | segments),
    )


@given(all_params())
def test_params_round_trip(params: Params) -> None:
    data = params.pack()
    assert struct.unpack_from("=I", data)[0] == len(data) == PARAMS_SIZE
    assert Params.unpack(data) == params


def test_no_preferred_size_is_the_physical_block() -> None:
    params = Params(BasicParams(size=1 << 20, physical_block=4096))
    assert Params.unpack(params.pack()) == Params(replace(params.basic, io_min=4096, io_opt=4096))


@given(
    st.builds(
        DeviceInfo,
        id=st.integers(-1, (1 << 31) - 1),
        queues=st.integers(1, 4096),
        depth=st.integers(1, 4096),
        max_io_bytes=st.integers(4096, 32 << 20),
        flags=st.integers(0, (1 << 64) - 1).map(Features),
        state=st.sampled_from(DeviceState),
        pid=st.integers(-1, (1 << 31) - 1),
        server_flags=st.integers(0, (1 << 64) - 1),
    )
)
def test_device_info_round_trip(info: DeviceInfo) -> None:
    assert DeviceInfo.unpack(info.pack()) == info


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("size", -512),
        ("size", 1000),
        ("size", 1 << 63),
        ("logical_block", 256),
        ("logical_block", 768),
        ("logical_block", 8192),
        ("physical_block", 256),
        ("physical_block", 512 << 20),
        ("io_min", 100),
        ("io_opt", 3 << 10),
        ("max_io", 512),
        ("max_io", 4097),
        ("chunk", 100),
        ("virt_boundary_mask", 1 << 64),
        ("attributes", Attributes.FUA),
    ],
)
def test_impossible_basics(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        replace(BasicParams(size=1 << 20), **{field: value})


def test_impossible_combinations() -> None:
    basic = BasicParams(size=1 << 20, logical_block=4096)
    with pytest.raises(ValueError, match="granularity"):
        DiscardParams(granularity=0)
    with pytest.raises(ValueError, match="granularity"):
        Params(basic, discard=DiscardParams(granularity=512))
    with pytest.raises(ValueError, match="max_discard"):
        DiscardParams(granularity=4096, max_discard=1 << 50)
    with pytest.raises(ValueError, match="dma_alignment"):
        Params(basic, dma_alignment=4096)
    with pytest.raises(ValueError, match="max_segment_size"):
        SegmentParams(max_segments=1, max_segment_size=512)
    with pytest.raises(ValueError, match="boundary_mask"):
        SegmentParams(max_segments=1, max_segment_size=4096, boundary_mask=511)
    with pytest.raises(ValueError, match="virt_boundary_mask"):
        Params(replace(basic, virt_boundary_mask=4095), segment=SegmentParams(16, 65536))
    with pytest.raises(ValueError, match="depth"):
        DeviceInfo(id=-1, queues=1, depth=5000, max_io_bytes=1 << 20, flags=Features(0))
