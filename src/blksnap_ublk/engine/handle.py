# SPDX-License-Identifier: MIT
"""What all objects of the engine have in common: a C pointer with one owner, and errors as exceptions."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from blksnap_ublk.engine._engine import ffi


def check(result: int, what: str) -> int:
    """The result of a C function, or OSError(errno, "what: reason") where it is a negative errno."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def create(function: Callable[..., Any], *arguments: object, what: str) -> Any:
    """Calls a C function that returns a pointer and stores its error through the last argument."""
    error = ffi.new("int *")
    pointer = function(*arguments, error)
    if pointer == ffi.NULL:
        check(error[0] or -1, what)
    return pointer


def pin(memory: Any) -> Any:
    """A pointer to writable memory (mmap, bytearray, numpy array), which cannot go away while it is referred to."""
    return ffi.from_buffer(memory, require_writable=True)


class Pinned:
    """Memory that several objects use: kept where it is until the last of them has let it go."""

    def __init__(self, memory: Any) -> None:
        self.pointer = pin(memory)
        self._users = 1

    def hold(self) -> Self:
        """One more user."""
        self._users += 1
        return self

    def let_go(self) -> None:
        """One user less; the memory may be closed by its owner after the last."""
        self._users -= 1
        if not self._users:
            ffi.release(self.pointer)


class Handle:
    """Owner of one C object. Closed by `close()` or as a context manager; closing twice is allowed."""

    _name = "object"

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        self._users = 0

    @property
    def pointer(self) -> Any:
        """The C object; ValueError when it is closed."""
        if self._pointer is None:
            raise ValueError(f"this {self._name} is closed")
        return self._pointer

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._pointer is None

    def close(self) -> None:
        """Frees the C object. OSError(EBUSY) while something uses it: nothing is changed then."""
        if self._pointer is not None:
            if self._users:
                raise OSError(errno.EBUSY, f"closing a {self._name}: it is still in use")
            self._free(self._pointer)
            self._pointer = None

    def hold(self) -> Self:
        """Keeps it from being closed until `let_go`. For objects whose C side does not count its users."""
        self._users += 1
        return self

    def let_go(self) -> None:
        """Ends one `hold`."""
        self._users -= 1

    def _free(self, pointer: Any) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
