# SPDX-License-Identifier: MIT
"""Targets written in Python: a class with `read`, and as many of the other operations as it has."""

from __future__ import annotations

from blksnap_ublk.ublk.params import Attributes, BasicParams, DiscardParams, Params

MAX_DISCARD = 1 << 30


class PyTarget:
    """Base class of a target written in Python. What it can do is seen from the methods that it has:

    * `read(self, offset: int, buf: memoryview) -> None` must be there; it fills all of `buf`.
    * `write(self, offset: int, buf: memoryview) -> None`; without it the device is read-only. `buf` is read-only too.
    * `flush(self) -> None` makes all that was written before stable; without it the device has no volatile cache,
      so a write must be stable when it returns.
    * `discard(self, offset: int, length: int) -> None`: these data are not needed any more.
    * `write_zeroes(self, offset: int, length: int) -> None`; without it the kernel writes zeroes.

    Offsets and lengths are bytes, multiples of `block`, inside the device. `buf` is valid until the method returns: it
    must not be kept. An OSError ends the request with its errno; any other exception with EIO and a traceback in the
    log.

    With `workers` > 1 the methods are called from several threads at once.
    """

    size: int
    """Bytes, a multiple of `block`; must be set when the device is added."""
    block: int = 512
    """Logical block: the least that is read or written."""
    physical_block: int = 4096
    """What is read and written best."""
    workers: int = 1
    """Threads that call the methods."""


OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes")


def abilities(target: PyTarget) -> frozenset[str]:
    """Those of OPERATIONS that a target has. Raises TypeError when it cannot even read."""
    found = frozenset(name for name in OPERATIONS if callable(getattr(target, name, None)))
    if "read" not in found:
        raise TypeError(f"{type(target).__name__} has no method read(self, offset, buf)")
    return found


def params_of(target: PyTarget, max_io: int) -> Params:
    """The parameters of a device that serves a target. Raises TypeError, ValueError for impossible sizes."""
    able = abilities(target)
    size = getattr(target, "size", None)
    if not isinstance(size, int):
        raise TypeError(f"{type(target).__name__}.size must be the size of the device in bytes, not {size!r}")
    attributes = Attributes(0)
    if "write" not in able:
        attributes |= Attributes.READ_ONLY
    elif "flush" in able:
        attributes |= Attributes.VOLATILE_CACHE | Attributes.FUA
    discard = None
    if "write" in able and able & {"discard", "write_zeroes"}:
        discard = DiscardParams(
            granularity=max(target.block, target.physical_block) if "discard" in able else target.block,
            max_discard=MAX_DISCARD if "discard" in able else 0,
            max_write_zeroes=MAX_DISCARD if "write_zeroes" in able else 0,
        )
    return Params(
        basic=BasicParams(
            size=size,
            logical_block=target.block,
            physical_block=max(target.physical_block, target.block),
            max_io=max_io,
            attributes=attributes,
        ),
        discard=discard,
    )
