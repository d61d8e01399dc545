# SPDX-License-Identifier: MIT
"""The description of `io.blksnap.Ublk` says of every method, parameter, reply and error what the code has."""

import re
from enum import Enum
from types import NoneType
from typing import Any, get_type_hints

import msgspec
import pytest

from blksnap_ublk import calls, forms
from blksnap_ublk.daemon.interface import ublk_interface
from blksnap_ublk.errors import ERROR_CLASSES, ERROR_PREFIX
from tests.unit.fake_service import FakeService

INTERFACE = ublk_interface(FakeService())
TEXT = re.sub(r"#.*", "", INTERFACE.description)
WORD = re.compile(r"\w+|->|[][?(),:]")

# Enums whose values are no names in varlink are strings there.
STRINGS = {forms.DataPath}


class Parser:
    """Just enough of varlink's language to read one description; a struct becomes a dict, an enum a tuple."""

    def __init__(self, text: str) -> None:
        _, _, body = text.partition(f"interface {calls.INTERFACE}")
        self.words: list[str] = WORD.findall(body)
        self.types: dict[str, Any] = {}
        self.methods: dict[str, tuple[Any, Any]] = {}
        self.errors: dict[str, Any] = {}
        while self.words:
            kind, name = self.take(), self.take()
            match kind:
                case "type":
                    self.types[name] = self.type()
                case "method":
                    parameters = self.type()
                    self.take("->")
                    self.methods[name] = (parameters, self.type())
                case "error":
                    self.errors[name] = self.type()
                case _:
                    raise AssertionError(f"unexpected {kind}")

    def take(self, expected: str | None = None) -> str:
        word = self.words.pop(0)
        assert expected in (None, word)
        return word

    def type(self) -> Any:
        word = self.take()
        if word == "?":
            return ("?", self.type())
        if word == "[":
            self.take("]")
            return ("[]", self.type())
        return word if word != "(" else self.members()

    def members(self) -> Any:
        fields: dict[str, Any] = {}
        names: list[str] = []
        while self.words[0] != ")":
            name = self.take()
            if self.words[0] == ":":
                self.take()
                fields[name] = self.type()
            else:
                names.append(name)
            if self.words[0] == ",":
                self.take()
        self.take(")")
        return tuple(names) if names else fields


DESCRIBED = Parser(TEXT)


def described_as(kind: Any, *, inline: bool = False) -> Any:
    """The varlink type of a Python type, as the parser gives it."""
    arguments: tuple[Any, ...] = getattr(kind, "__args__", ())
    if NoneType in arguments:
        (other,) = [argument for argument in arguments if argument is not NoneType]
        return ("?", described_as(other))
    origin = getattr(kind, "__origin__", None)
    if origin is list:
        return ("[]", described_as(arguments[0]))
    if origin is dict:
        return "object"
    if issubclass(kind, Enum):
        return "string" if kind in STRINGS else tuple(member.value for member in kind)
    if issubclass(kind, msgspec.Struct):
        if not inline:
            return kind.__name__
        hints = get_type_hints(kind)
        return {field: described_as(hints[field]) for field in kind.__struct_fields__}
    return {str: "string", int: "int", float: "float", bool: "bool"}[kind]


@pytest.mark.parametrize("name", DESCRIBED.types)
def test_types(name: str) -> None:
    assert DESCRIBED.types[name] == described_as(getattr(forms, name), inline=True)


@pytest.mark.parametrize("name", INTERFACE.methods)
def test_methods(name: str) -> None:
    method = INTERFACE.methods[name]
    reply = get_type_hints(method.handler)["return"]
    assert DESCRIBED.methods[name] == (
        described_as(method.parameters, inline=True),
        described_as(reply, inline=True),
    )


def test_nothing_is_described_that_is_not_there() -> None:
    assert set(DESCRIBED.methods) == set(INTERFACE.methods)


def test_errors() -> None:
    names = {kind.error_name.removeprefix(ERROR_PREFIX) for kind in ERROR_CLASSES}
    assert DESCRIBED.errors == {name: {"message": "string"} for name in names}
