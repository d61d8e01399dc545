# SPDX-License-Identifier: MIT
"""An interface for the tests of the server: handlers that answer, wait, stream and fail."""

import asyncio

import msgspec

from blksnap_ublk.varlink.interface import Call, Interface, Method
from blksnap_ublk.varlink.wire import VarlinkError, expected_more

DESCRIPTION = """\
interface org.example.echo

method Echo(text: string) -> (text: string)

method Wait() -> (text: string)

method Count(to: int) -> (number: int)

method Follow() -> (number: int)

method Fail(kind: string) -> ()

error Refused (text: string)
"""


class Text(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class Kind(msgspec.Struct, forbid_unknown_fields=True):
    kind: str


class To(msgspec.Struct, forbid_unknown_fields=True):
    to: int


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


class Number(msgspec.Struct):
    number: int


class Echo:
    """The interface, and what became of its handlers."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.waiting = 0
        self.done: list[str] = []
        self.following = 0

    def interface(self) -> Interface:
        return Interface(
            name="org.example.echo",
            description=DESCRIPTION,
            methods={
                "Echo": Method(Text, self.echo),
                "Wait": Method(Nothing, self.wait),
                "Count": Method(To, self.count, stream=True),
                "Follow": Method(Nothing, self.follow, stream=True),
                "Fail": Method(Kind, self.fail),
            },
            to_error=lambda error: VarlinkError("org.example.echo.Refused", {"text": str(error)}),
        )

    async def echo(self, parameters: Text, call: Call) -> Text:
        self.done.append(parameters.text)
        return parameters

    async def wait(self, parameters: Nothing, call: Call) -> Text:
        self.waiting += 1
        try:
            await self.release.wait()
        finally:
            self.waiting -= 1
        self.done.append("waited")
        return Text("waited")

    async def count(self, parameters: To, call: Call) -> Number:
        if not call.more:
            raise expected_more()
        for number in range(1, parameters.to):
            await call.send(Number(number))
        return Number(parameters.to)

    async def follow(self, parameters: Nothing, call: Call) -> Number:
        self.following += 1
        try:
            await call.send(Number(0))
            await asyncio.Event().wait()
        finally:
            self.following -= 1
        return Number(1)

    async def fail(self, parameters: Kind, call: Call) -> object:
        match parameters.kind:
            case "varlink":
                raise VarlinkError("org.example.echo.Refused", {"text": "as told"})
            case "connection":
                raise ConnectionResetError("some other connection")
            case "cancelled":
                raise asyncio.CancelledError
            case "unsendable":
                return {"text": "\ud800"}
            case "no-form":
                return object()
        raise ValueError(parameters.kind)
