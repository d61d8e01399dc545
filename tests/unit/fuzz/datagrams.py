# SPDX-License-Identifier: MIT
"""Payloads of messages between our processes: texts, JSON of the wrong form, messages that were cut or changed."""

from __future__ import annotations

import json

import msgspec
from hypothesis import strategies as st

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, message: bytes) -> bytes:
    """The message, cut or with one character replaced by an ASCII one."""
    text = message.decode()
    at = draw(st.integers(0, len(text) - 1))
    if draw(st.booleans()):
        return text[: at + 1].encode()
    return (text[:at] + chr(draw(st.integers(0, 127))) + text[at + 1 :]).encode()


@st.composite
def replaced(draw: st.DrawFn, message: bytes) -> bytes:
    """The message with another value in one of its fields, integers beyond 64 bits among them."""
    fields = json.loads(message)
    name = draw(st.sampled_from(sorted(fields)))
    if name != "type":
        fields[name] = draw(json_values | st.sampled_from([1 << 63, 1 << 64, 1 << 70, -(1 << 70)]))
    return json.dumps(fields).encode()


def payloads(messages: st.SearchStrategy[msgspec.Struct], types: list[str]) -> st.SearchStrategy[bytes]:
    """Anything but a stop: `types` are the tags of the messages that may be carried out."""
    fields = st.dictionaries(st.sampled_from(["device", "image", "storage", "name", "size", "ranges"]), json_values)
    tagged = st.builds(lambda tag, rest: json.dumps({"type": tag, **rest}).encode(), st.sampled_from(types), fields)
    return st.one_of(
        st.binary(min_size=1, max_size=80),
        st.text(min_size=1, max_size=80).map(str.encode),
        json_values.map(lambda value: json.dumps(value).encode()),
        tagged,
        messages.map(msgspec.json.encode).flatmap(changed),
        messages.map(msgspec.json.encode).flatmap(replaced),
    )
