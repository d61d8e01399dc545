# SPDX-License-Identifier: MIT
"""What a server serves: interfaces, their methods, and the call that a handler gets."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from blksnap_ublk.varlink import wire
from blksnap_ublk.varlink.wire import VarlinkError


class Call(Protocol):
    """One call, as its handler sees it."""

    @property
    def more(self) -> bool:
        """Whether the caller takes several replies."""
        ...

    async def send(self, reply: object) -> None:
        """Send a reply that is not the last one, as fast as the caller reads. Only when `more`."""
        ...


P = TypeVar("P")


@dataclass(frozen=True)
class Method(Generic[P]):
    """A method: the type of its parameters, and an async handler whose result is the last (or only) reply.

    A `stream` may send replies before the last one. Its handler is cancelled when the caller is gone or the server
    ends, so it must only look. Every other handler runs to its end, whatever becomes of its caller.
    """

    parameters: type[P]
    handler: Callable[[P, Call], Awaitable[object]]
    stream: bool = False


@dataclass(frozen=True)
class Interface:
    """An interface: qualified name, description in varlink's language, methods by their plain names.

    `to_error` gives the error reply for an exception that a handler raised and that is no VarlinkError.
    """

    name: str
    description: str
    methods: Mapping[str, Method[Any]]
    to_error: Callable[[Exception], VarlinkError]


def decode_parameters(raw: msgspec.Raw, kind: type[P]) -> P:
    """The parameters of a call. Raises the VarlinkError InvalidParameter, which names the first wrong one."""
    text = bytes(raw)
    try:
        return msgspec.json.decode(b"{}" if text == b"null" else text, type=kind)
    except wire.DECODE_ERRORS as error:
        raise wire.invalid_parameter(_wrong_parameter(str(error))) from error


def _wrong_parameter(complaint: str) -> str:
    """The name of the parameter in a complaint of msgspec, such as ``Expected `int`, got `str` - at `$.depth` ``."""
    _, at, path = complaint.rpartition(" - at `$.")
    if at:
        return path.rstrip("`").split(".")[0].split("[")[0]
    _, field, name = complaint.rpartition("field `")
    return name.rstrip("`") if field else "parameters"
