# SPDX-License-Identifier: MIT
"""Any parameters for any method of the interface itself: each call has an answer, and the next one too."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blksnap_ublk import calls
from blksnap_ublk.daemon.interface import ublk_interface
from blksnap_ublk.varlink import wire
from tests.unit.fake_service import FakeService
from tests.unit.fuzz.datagrams import json_values
from tests.unit.serving import serving_ublk

PATIENCE = 30.0
METHODS = sorted(set(ublk_interface(FakeService()).methods) - {"Stop"})
fields = st.sampled_from(
    ["device", "devices", "snapshot", "snapshots", "storage", "limit", "ranges", "since", "interval"]
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    socket_path = tmp_path_factory.mktemp("varlink") / "socket"
    with serving_ublk(socket_path, FakeService()):
        yield socket_path


def one_reply(connection: socket.socket) -> wire.ReplyMessage:
    """The next message."""
    received = b""
    while not received.endswith(b"\0"):
        part = connection.recv(65536)
        assert part, "the connection was closed without an answer"
        received += part
    return wire.decode_reply(received[:-1])


def ask(path: Path, method: str, parameters: object) -> wire.ReplyMessage:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(path))
        connection.sendall(wire.encode_call(method, parameters))
        return one_reply(connection)


def plausible(method: str) -> st.SearchStrategy[Any]:
    """Parameters of the right types, and of any types under the right names."""
    kind = ublk_interface(FakeService()).methods[method].parameters
    right: st.SearchStrategy[Any] = st.from_type(kind).map(msgspec.to_builtins)
    names = [field.name for field in msgspec.structs.fields(kind)]
    wrong = st.fixed_dictionaries({}, optional=dict.fromkeys(names, json_encodable))
    return right | wrong | st.dictionaries(fields, json_encodable, max_size=3)


def fits(value: object) -> bool:
    """Whether a client can send it: integers of 64 bits, texts without lone surrogates."""
    try:
        msgspec.json.encode(value)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


json_encodable = json_values.filter(fits)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), method=st.sampled_from(METHODS))
def test_any_parameters_have_an_answer(path: Path, data: st.DataObject, method: str) -> None:
    parameters = data.draw(plausible(method).filter(fits))
    if isinstance(parameters, dict) and isinstance(parameters.get("interval"), int):
        parameters["interval"] = min(parameters["interval"], 20)
    reply = ask(path, f"{calls.INTERFACE}.{method}", parameters)
    if reply.error is not None:
        said = msgspec.json.decode(reply.parameters)
        assert isinstance(said, dict)
        assert "internal error" not in str(said.get("message", "")), said
    assert ask(path, f"{calls.INTERFACE}.GetVersion", {}).error is None
