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


class Ending(msgspec.Struct, tag="ending", frozen=True):
    """Control is about to end with exit status `status`, which a keeper that adopted it could not learn otherwise."""

    status: int


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End the daemon as SIGTERM does. Answered before anything ends. After Leave: end the keeper, and nothing else."""


class HandOver(msgspec.Struct, tag="hand-over", frozen=True):
    """From a keeper that is about to replace this one: the lock of the runtime directory and the listening sockets.

    They come with the answer, in the order of `Done.names`: `lock`, `io`, `control`. Nothing changes. `managed`: it was
    started by the service manager, as it has to be where that looks after this one.
    """

    managed: bool


class Leave(msgspec.Struct, tag="leave", frozen=True):
    """From a keeper that replaces this one: end the spares, and look after nothing any more; all that is held can still
    be listed and got. What others ask is refused with EAGAIN. `pid`: the keeper that replaces this one."""

    pid: int


Message = Put | Get | Drop | List | Ending | Stop | HandOver | Leave


class Done(msgspec.Struct, tag="done", frozen=True):
    """The message was carried out. `names` is sorted, but for HandOver."""

    names: list[str] = []


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Nothing was changed. `errno` positive; `text` one line."""

    errno: int
    text: str


Answer = Done | Refused

MESSAGE_LIMIT = 256 << 10
"""Bytes of a message or an answer."""
