# SPDX-License-Identifier: MIT
"""Messages: cut out of any stream in any pieces, and nothing that comes in does more than raise MalformedMessage."""

import contextlib
import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.varlink import wire
from blksnap_ublk.varlink.interface import decode_parameters
from blksnap_ublk.varlink.wire import MalformedMessage, MessageSplitter, MessageTooLong, VarlinkError

without_nul = st.binary(max_size=40).map(lambda data: data.replace(b"\0", b"."))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(without_nul, max_size=8), without_nul, st.data())
def test_messages_come_out_as_they_went_in_however_the_stream_is_cut(
    messages: list[bytes], rest: bytes, data: st.DataObject
) -> None:
    stream = b"".join(message + b"\0" for message in messages) + rest
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))) | {0, len(stream)})
    splitter = MessageSplitter(40)
    found = [m for begin, end in itertools.pairwise(cuts) for m in splitter.feed(stream[begin:end])]
    assert found == messages
    assert splitter.unfinished == bool(rest)


def test_a_stream_cut_at_every_byte() -> None:
    stream = wire.encode_call("a.b.C", {"d": "é\0"}) + wire.encode_call("a.b.D", {}, more=True)
    splitter = MessageSplitter(100)
    found = [wire.decode_call(m) for byte in stream for m in splitter.feed(bytes([byte]))]
    assert [call.method for call in found] == ["a.b.C", "a.b.D"]
    assert msgspec.json.decode(found[0].parameters) == {"d": "é\0"}
    assert found[1].more


@given(st.integers(0, 30), st.integers(1, 50), st.booleans())
def test_the_limit_holds_to_the_byte(limit: int, piece: int, ended: bool) -> None:
    for length, allowed in ((limit, True), (limit + 1, False)):
        stream = b"x" * length + (b"\0" if ended else b"")
        splitter = MessageSplitter(limit)
        try:
            for begin in range(0, len(stream), piece):
                list(splitter.feed(stream[begin : begin + piece]))
        except MessageTooLong:
            assert not allowed
        else:
            assert allowed


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    for decode in (wire.decode_call, wire.decode_reply):
        with contextlib.suppress(MalformedMessage):
            decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"method":1}',
        b'{"method":"a.b","more":"yes"}',
        b'{"method":"a.b"} {}',
        b'{"method":"\xff\xfe"}',
        b'{"method":"\\ud800"}',
        b'{"method":"a.b","parameters":' + b"[" * 100_000,
    ],
)
def test_malformed_calls(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        wire.decode_call(data)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.booleans(), st.booleans())
def test_calls_and_replies_survive_the_way(parameters: dict[str, object], more: bool, oneway: bool) -> None:
    call = wire.decode_call(wire.encode_call("a.b.C", parameters, more=more, oneway=oneway)[:-1])
    assert (call.method, bool(call.more), bool(call.oneway)) == ("a.b.C", more, oneway)
    assert msgspec.json.decode(call.parameters) == parameters
    reply = wire.decode_reply(wire.encode_reply(parameters, continues=more)[:-1])
    assert (msgspec.json.decode(reply.parameters), bool(reply.continues), reply.error) == (parameters, more, None)
    failed = wire.decode_reply(wire.encode_error(VarlinkError("a.b.E", parameters))[:-1])
    assert (msgspec.json.decode(failed.parameters), failed.error) == (parameters, "a.b.E")


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    start: int


class Parameters(msgspec.Struct, forbid_unknown_fields=True):
    device: str
    depth: int | None = None
    ranges: list[Inner] = []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (b"{}", "device"),
        (b"null", "device"),
        (b"[]", "parameters"),
        (b'{"device":1}', "device"),
        (b'{"device":"a","depth":"b"}', "depth"),
        (b'{"device":"a","extra":1}', "extra"),
        (b'{"device":"a","ranges":[{"start":1},{"start":"x"}]}', "ranges"),
        (b'{"device":"a","ranges":[{}]}', "ranges"),
        (b'{"device":"\xff"}', "parameters"),
    ],
)
def test_the_wrong_parameter_is_named(text: bytes, wrong: str) -> None:
    with pytest.raises(VarlinkError) as caught:
        decode_parameters(msgspec.Raw(text), Parameters)
    assert caught.value.name == "org.varlink.service.InvalidParameter"
    assert caught.value.parameters == {"parameter": wrong}


@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_parameters_are_read_or_refused(text: bytes) -> None:
    with contextlib.suppress(VarlinkError):
        assert isinstance(decode_parameters(msgspec.Raw(text), Parameters), Parameters)
