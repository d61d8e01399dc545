# SPDX-License-Identifier: MIT
"""Ownership of descriptors that came with a message."""

import os
from collections.abc import Iterable
from types import TracebackType


class Descriptors:
    """Descriptors received with a message; all that are not taken are closed by `close`.

    Index and `len` count them as they were sent, taken ones included.
    """

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._numbers: list[int | None] = list(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> int:
        """The descriptor, which stays owned here. Raises IndexError, also for one that was taken."""
        number = self._numbers[index]
        if number is None:
            raise IndexError(f"descriptor {index} was taken")
        return number

    def take(self, index: int) -> int:
        """The descriptor, which is the caller's from now on. Raises IndexError."""
        number = self[index]
        self._numbers[index] = None
        return number

    def close(self) -> None:
        """Close what was not taken. May be called again."""
        for index, number in enumerate(self._numbers):
            if number is not None:
                self._numbers[index] = None
                os.close(number)

    def __enter__(self) -> "Descriptors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
