# SPDX-License-Identifier: MIT
"""A real io process that gets any messages with any descriptors: each is answered, nothing crashes, nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoClient, IoRefused
from blksnap_ublk.rpc.channel import Channel
from tests.unit.fuzz.datagrams import payloads
from tests.unit.fuzz.descriptors import KINDS, descriptors
from tests.unit.fuzz.raw_call import connect, raw_call
from tests.unit.ioproc.test_io_process import PATIENCE, Io

NO_UBLK_DEVICE = 1 << 24
"""An id that no ublk device has: whatever runs on this machine is left alone."""

names = st.sampled_from(["a", "b", "", "ä/\n"])
sizes = st.sampled_from([-(1 << 63), -1, 0, 1, 511, 512, 4096, 65536, 1 << 20, (1 << 31) - 1, 1 << 32, (1 << 63) - 1])
small = st.sampled_from([-1, 0, 1, 2, 128, 65536])
serving = {
    "ublk_id": st.just(NO_UBLK_DEVICE),
    "depth": small,
    "desc_size": st.sampled_from([0, 24]),
    "flags": st.sampled_from([0, 1, 1 << 11]),
    "zero_copy": st.booleans(),
}
members = st.builds(messages.Member, device=names, image=names)
message_strategy: st.SearchStrategy[messages.Message] = st.one_of(
    st.builds(messages.Hello, version=small),
    st.builds(messages.Status),
    st.builds(messages.OpenDevice, device=names, size=sizes, block=sizes, unit=sizes, tracking_block=sizes),
    st.builds(
        messages.OpenDevice,
        device=names,
        size=st.just(1 << 20),
        block=st.just(512),
        unit=st.just(4096),
        tracking_block=st.just(65536),
    ),
    st.builds(messages.ServeDevice, device=names, queues=small, **serving),
    st.builds(messages.CloseDevice, device=names),
    st.builds(messages.OpenStorage, storage=names, unit=st.just(4096) | sizes),
    st.builds(messages.AddArea, storage=names, offset=sizes, length=sizes),
    st.builds(messages.CloseStorage, storage=names),
    st.builds(messages.Unstored, buffers=st.lists(names, max_size=3)),
    st.builds(messages.AddMapMemory, portions=st.lists(names, max_size=3)),
    st.builds(messages.OpenImage, image=names, device=names, storage=names, serial=st.just(1) | sizes),
    st.builds(messages.ServeImage, image=names, **serving),
    st.builds(messages.FinishImage, image=names),
    st.builds(messages.Take, members=st.lists(members, max_size=3), limit_ms=st.sampled_from([0, 1, 100])),
    st.builds(messages.Drop, image=names),
    st.builds(messages.Mark, device=names, ranges=st.lists(st.tuples(sizes, sizes), max_size=3)),
)
HARMLESS = ["hello", "status", "open-device", "close-device", "open-storage", "add-area", "open-image", "take", "mark"]
any_payload = payloads(cast("st.SearchStrategy[msgspec.Struct]", message_strategy), HARMLESS)
fitting: st.SearchStrategy[tuple[messages.Message, list[str]]] = st.sampled_from(
    [
        (messages.OpenDevice("a", 1 << 20, 512, 4096, 65536), ["mebibyte", "page", "page"]),
        (messages.OpenStorage("a", 4096), ["page"]),
        (messages.AddArea("a", 0, 1 << 20), ["mebibyte", "page"]),
        (messages.OpenImage("a", "a", "a", 1), ["mebibyte"]),
        (messages.Take([messages.Member("a", "a")], 100), ["page", "page"]),
        (messages.Mark("a", [(0, 4096)]), []),
    ]
)
"""What can be carried out, in this order at least."""
sendings = fitting | st.tuples(message_strategy, st.lists(st.sampled_from(KINDS), max_size=4))


@pytest.fixture(scope="module")
def io(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Io]:
    io = Io(tmp_path_factory.mktemp("io"))
    assert io.said == "ready\n"
    yield io
    assert io.process.poll() is None, io.end()
    log = io.end()
    assert "Traceback" not in log, log[-5000:]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    with descriptors(tmp_path_factory.mktemp("files")) as opened:
        yield opened


def remove_all(client: IoClient) -> None:
    """Everything that a sequence of messages has made."""
    held = client.status()
    for image in held.images:
        client.call(messages.Drop(image.image))
    for device in held.devices:
        client.call(messages.CloseDevice(device.device))
    for storage in held.storages:
        client.call(messages.CloseStorage(storage.storage))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(sendings, max_size=10))
def test_any_messages_are_answered(
    io: Io, files: dict[str, int], sent: list[tuple[messages.Message, list[str]]]
) -> None:
    with IoClient(io.path, PATIENCE) as client:
        for _ in range(2):  # by then the connection before this one is closed
            client.hello()
        before = io.descriptors(), io.mappings()
        for message, kinds in sent:
            try:
                client.call(message, [files[kind] for kind in kinds])
            except IoRefused as refused:
                expect_clear(refused.errno, refused.strerror)
        remove_all(client)
        assert (io.descriptors(), io.mappings()) == before
        assert client.status().devices == []


def expect_clear(number: int | None, text: str | None) -> None:
    """An error is one line, with an errno, and no mistake of the program."""
    assert number
    assert number > 0
    assert text
    assert len(text.splitlines()) == 1
    assert "internal error" not in text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    any_payload,
    st.lists(st.sampled_from(KINDS), max_size=4),
)
def test_any_payload_is_answered(io: Io, files: dict[str, int], payload: bytes, kinds: list[str]) -> None:
    channel: Channel = connect(io.path)
    try:
        answer = raw_call(channel, payload, [files[kind] for kind in kinds], messages.Done | messages.Refused)
    finally:
        channel.close()
    if isinstance(answer, messages.Refused):
        expect_clear(answer.errno, answer.text)
    with IoClient(io.path, PATIENCE) as client:
        client.hello()
        remove_all(client)
