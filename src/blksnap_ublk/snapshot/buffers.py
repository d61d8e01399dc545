# SPDX-License-Identifier: MIT
"""Files of the state directory through which queues of devices pass old data on its way to difference storages.

They outlive an io process: what one that died had not stored yet is there. So each file serves one io process only, and
is kept until what is in it was stored.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import ExitStack, suppress

import msgspec

from blksnap_ublk.engine import BUFFERS_BYTES
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot.context import Context

_PREFIX = "buffers-"
_AT_ONCE = 100  # files in one message
_log = logging.getLogger(__name__)


def serve(context: Context, message: messages.ServeDevice) -> None:
    """Sends the message, with such a file where there is room for one. Raises IoRefused, Failed."""
    with context.handing_over:
        name = _unused_name(context, message.device)
        context.buffers.add(name)
    try:
        try:
            descriptor = context.state.create(name, message.queues * BUFFERS_BYTES)
        except (BlksnapError, OSError) as error:
            _log.warning("writes that preserve old data will be slower: %s", error)
            context.io.call(message)
            return
        try:
            context.io.call(msgspec.structs.replace(message, buffers=name), [descriptor])
        except IoRefused:
            context.state.remove(name)
            raise
        finally:
            os.close(descriptor)
    finally:
        context.buffers.discard(name)


def tell_unstored(context: Context) -> None:
    """Before the sweep: the io process gets those that others have left. What it does not get, or what was damaged,
    is not stored: checksums tell where it lacks.

    Raises IoRefused(EALREADY) where it has them already, Failed, OSError.
    """
    left, _ = _unused(context)
    for first in range(0, len(left), _AT_ONCE):
        with ExitStack() as closing:
            opened = _opened(context, left[first : first + _AT_ONCE], closing)
            try:
                context.io.call(messages.Unstored(list(opened)), list(opened.values()))
            except IoRefused as error:
                if error.errno == errno.EALREADY:
                    raise
                _log.error("what was not stored yet: %s", error)


def remove_unused(context: Context) -> None:
    """Those that no io process has any more, when nothing has to be stored. Raises Failed."""
    names, inventory = _unused(context)
    if inventory.swept:
        for name in names:
            context.state.remove(name)


def _opened(context: Context, names: list[str], closing: ExitStack) -> dict[str, int]:
    """Those that are whole. Any other one no io process ever had: whoever made it has died meanwhile."""
    found = {}
    for name in names:
        with suppress(OSError):  # it was not to be used after all, or is none of ours
            descriptor = context.state.open(name)
            closing.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if status.st_size >= BUFFERS_BYTES and status.st_blocks * 512 >= status.st_size:
                found[name] = descriptor
    return found


def _all(context: Context) -> list[str]:
    return [name for name in context.state.names() if name.startswith(_PREFIX)]


def _unused(context: Context) -> tuple[list[str], messages.Inventory]:
    """Those that neither the io process has nor anybody is about to give it."""
    # In this order: what is there was being handed over then, or is known to the io process now.
    names = _all(context)
    begun = set(context.buffers)
    inventory = context.io.inventory()
    return sorted(set(names) - begun - {report.buffers for report in inventory.devices}), inventory


def _unused_name(context: Context, device: str) -> str:
    taken = {*_all(context), *context.buffers}
    return next(name for number in range(len(taken) + 1) if (name := f"{_PREFIX}{device}.{number}") not in taken)
