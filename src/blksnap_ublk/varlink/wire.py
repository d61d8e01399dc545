# SPDX-License-Identifier: MIT
"""Messages of varlink: how they are cut out of a byte stream, and what a call and a reply look like."""

from collections.abc import Iterator
from typing import Any

import msgspec

SERVICE = "org.varlink.service"
NOT_BEGUN = "io.blksnap.NotBegun"
"""The error for a call that was read by a service that ends, and not begun: another one may be asked."""
CALL_LIMIT = 1 << 20
REPLY_LIMIT = 16 << 20


class MalformedMessage(ValueError):
    """The other side sent what is no varlink message; nothing more can be read from it."""


class MessageTooLong(MalformedMessage):
    """A message is longer than agreed."""


class VarlinkError(Exception):
    """An error reply: a qualified `name` and its `parameters`."""

    def __init__(self, name: str, parameters: dict[str, Any] | None = None) -> None:
        self.name = name
        self.parameters: dict[str, Any] = {} if parameters is None else parameters
        super().__init__(f"{name} {self.parameters}" if self.parameters else name)


def interface_not_found(interface: str) -> VarlinkError:
    """The error for an interface that is not served."""
    return VarlinkError(f"{SERVICE}.InterfaceNotFound", {"interface": interface})


def method_not_found(method: str) -> VarlinkError:
    """The error for a method (qualified name) that its interface does not have."""
    return VarlinkError(f"{SERVICE}.MethodNotFound", {"method": method})


def invalid_parameter(parameter: str) -> VarlinkError:
    """The error for a parameter that is missing, unknown, or of the wrong type."""
    return VarlinkError(f"{SERVICE}.InvalidParameter", {"parameter": parameter})


def permission_denied() -> VarlinkError:
    """The error for a peer that may not call."""
    return VarlinkError(f"{SERVICE}.PermissionDenied")


def not_begun() -> VarlinkError:
    """The error for a call that comes when the service ends."""
    return VarlinkError(NOT_BEGUN)


def expected_more() -> VarlinkError:
    """The error for a call without `more` whose answer takes several replies."""
    return VarlinkError(f"{SERVICE}.ExpectedMore")


class CallMessage(msgspec.Struct, omit_defaults=True):
    """A call as it travels; `parameters` is a JSON object that has not been read yet."""

    method: str
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    oneway: bool | None = False
    more: bool | None = False


class ReplyMessage(msgspec.Struct, omit_defaults=True):
    """A reply as it travels; with `continues` more replies to the same call follow."""

    parameters: msgspec.Raw = msgspec.Raw(b"")
    continues: bool | None = False
    error: str | None = None


_call_decoder = msgspec.json.Decoder(CallMessage)
_reply_decoder = msgspec.json.Decoder(ReplyMessage)
_encoder = msgspec.json.Encoder()

# What msgspec raises for text that is not JSON, not UTF-8, of another type, or nested too deeply.
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_call(message: bytes) -> CallMessage:
    """The call in `message` (without its NUL). Raises MalformedMessage."""
    try:
        return _call_decoder.decode(message)
    except DECODE_ERRORS as error:
        raise MalformedMessage(f"not a varlink call: {error}") from error


def decode_reply(message: bytes) -> ReplyMessage:
    """The reply in `message` (without its NUL). Raises MalformedMessage."""
    try:
        return _reply_decoder.decode(message)
    except DECODE_ERRORS as error:
        raise MalformedMessage(f"not a varlink reply: {error}") from error


def encode_call(method: str, parameters: object, *, more: bool = False, oneway: bool = False) -> bytes:
    """A call with its NUL; `parameters` is anything that msgspec encodes as a JSON object."""
    raw = msgspec.Raw(_encoder.encode(parameters))
    return _encoder.encode(CallMessage(method, raw, oneway=oneway, more=more)) + b"\0"


def encode_reply(parameters: object, *, continues: bool = False) -> bytes:
    """A reply with its NUL."""
    return _encoder.encode(ReplyMessage(msgspec.Raw(_encoder.encode(parameters)), continues=continues)) + b"\0"


def encode_error(error: VarlinkError) -> bytes:
    """An error reply with its NUL."""
    raw = msgspec.Raw(_encoder.encode(error.parameters))
    return _encoder.encode(ReplyMessage(raw, error=error.name)) + b"\0"


class MessageSplitter:
    """Cuts a byte stream, as it comes in, into messages.

    Holds at most `limit` bytes of an unfinished message, and never looks at a byte twice.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._begun = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that `data` completes, without their NULs. To be read to its end.

        Raises MessageTooLong, after the messages before it; the splitter is of no use afterwards.
        """
        *ends, rest = data.split(b"\0")
        for end in ends:
            self._extend(end)
            message = bytes(self._begun)
            self._begun.clear()
            yield message
        self._extend(rest)

    @property
    def unfinished(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._begun)

    def _extend(self, data: bytes) -> None:
        if len(self._begun) + len(data) > self._limit:
            raise MessageTooLong(f"a message is longer than {self._limit} bytes")
        self._begun += data
