# SPDX-License-Identifier: MIT
"""What the demo tells, and how it fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class NotAsPromised(Exception):
    """Something is not as promised; the text says what was found instead."""


def check(promise: str, kept: bool, found: object = "") -> None:
    """Tells that a promise is kept, or raises NotAsPromised with what was found."""
    if not kept:
        raise NotAsPromised(f"{promise}: not so{f': {found}' if found != '' else ''}")
    tell(f"ok: {promise}")


def tell(text: str) -> None:
    """One line for the reader."""
    print(f"   {text}", flush=True)


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    """A step of the scenario, with the time that it took."""
    print(f"\n{number}. {title}", flush=True)
    began = time.monotonic()
    yield
    tell(f"({time.monotonic() - began:.1f} s)")


def mib(count: int) -> str:
    """`12.5 MiB`."""
    return f"{count / (1 << 20):.1f} MiB"
