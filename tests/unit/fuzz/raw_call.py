# SPDX-License-Identifier: MIT
"""A call whose message is any bytes."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from blksnap_ublk.rpc.channel import Channel

PATIENCE = 30.0


def connect(path: str | os.PathLike[str]) -> Channel:
    """A connection that waits for an answer, but not for ever."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    connection.connect(os.fspath(path))
    channel = Channel(connection)
    channel.wait_limit(PATIENCE)
    return channel


def raw_call(channel: Channel, payload: bytes, descriptors: Sequence[int], answer: Any) -> Any:
    """Sends the payload; its answer, of the type `answer`. TimeoutError when there is none."""
    channel.send(payload, descriptors)
    datagram = channel.receive()
    assert datagram is not None, "the connection was closed without an answer"
    datagram.descriptors.close()
    return msgspec.json.decode(datagram.payload, type=answer)
