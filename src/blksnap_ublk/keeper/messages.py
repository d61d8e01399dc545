# SPDX-License-Identifier: MIT
"""What is asked of the keeper process, on `keeper.sock`. Each message gets exactly one answer."""

import msgspec


class Put(msgspec.Struct, tag="put", frozen=True):
    """Hold a descriptor, which comes with the message, under `name`, in place of one already held under it."""

    name: str


class Get(msgspec.Struct, tag="get", frozen=True):
    """Give a duplicate of the descriptor held under `name`; it comes with the answer."""

    name: str


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """Close the descriptor held under `name`."""

    name: str


class List(msgspec.Struct, tag="list", frozen=True):
    """The names of all descriptors held; answered in `Done.names`."""


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End the daemon as SIGTERM does. Answered before anything ends."""


Message = Put | Get | Drop | List | Stop


class Done(msgspec.Struct, tag="done", frozen=True):
    """The message was carried out. `names` is sorted."""

    names: list[str] = []


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Nothing was changed. `errno` positive; `text` one line."""

    errno: int
    text: str


Answer = Done | Refused

MESSAGE_LIMIT = 256 << 10
"""Bytes of a message or an answer."""
