# SPDX-License-Identifier: MIT
"""A real keeper that gets any messages with any descriptors: each is answered, and no more is held than was put."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blksnap_ublk.keeper import messages
from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.keeper.runtime import RuntimePaths
from tests.unit.fuzz.datagrams import payloads
from tests.unit.fuzz.descriptors import KINDS, descriptors
from tests.unit.fuzz.raw_call import connect, raw_call
from tests.unit.keeper.running import Running

names = st.sampled_from(["a", "origin:b", "", "x" * 255, "x" * 256, "ä\n\0"]) | st.text(max_size=8)
message_strategy: st.SearchStrategy[messages.Message] = st.one_of(
    st.builds(messages.Put, name=names),
    st.builds(messages.Get, name=names),
    st.builds(messages.Drop, name=names),
    st.builds(messages.List),
)
HARMLESS = ["put", "get", "drop", "list"]
attached = st.lists(st.sampled_from(KINDS), max_size=3)
sendings = st.tuples(message_strategy.map(msgspec.json.encode), attached) | st.tuples(
    payloads(cast("st.SearchStrategy[msgspec.Struct]", message_strategy), HARMLESS), attached
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(RuntimePaths(tmp_path_factory.mktemp("keeper") / "run"))
    assert running.told == "0 ready"
    for role in ("io", "control"):
        running.spare(role)
    yield running
    assert running.process.poll() is None, "the keeper has died"
    status, log = running.end()
    assert status == 0
    assert "unexpected error" not in log, log[-5000:]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    with descriptors(tmp_path_factory.mktemp("files")) as opened:
        yield opened


def descriptors_of(running: Running) -> int:
    return len(list(Path(f"/proc/{running.process.pid}/fd").iterdir()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(sendings, max_size=6))
def test_any_messages_are_answered(
    running: Running, files: dict[str, int], sent: list[tuple[bytes, list[str]]]
) -> None:
    with KeeperClient(running.paths.keeper_socket) as keeper:
        for _ in range(2):  # by then the connection before this one is closed
            assert keeper.names() == []
        before = descriptors_of(running)
        for payload, kinds in sent:
            channel = connect(running.paths.keeper_socket)
            try:
                answer = raw_call(channel, payload, [files[kind] for kind in kinds], messages.Done | messages.Refused)
            finally:
                channel.close()
            if isinstance(answer, messages.Refused):
                assert answer.errno > 0
                assert answer.text
                assert "internal error" not in answer.text
        held = keeper.names()
        for name in held:
            keeper.drop(name)
        assert keeper.names() == []
        assert descriptors_of(running) == before
