# SPDX-License-Identifier: MIT
"""Files of the state directory through which queues of devices pass old data on its way to difference storages.

They outlive an io process: what one that died had not stored yet is there. So each file serves one io process only, and
is kept until what is in it was stored.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import ExitStack

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


def tell_unstored(context: Context, inventory: messages.Inventory) -> None:
    """Before the sweep: the io process gets those that others have left. What it does not get, or what was damaged,
    is not stored: checksums tell where it lacks.

    Raises IoRefused(EALREADY) where it has them already, Failed, OSError.
    """
    used = _in_use(inventory)
    # One that is not whole no io process ever had: whoever made it has died meanwhile.
    left = [name for name in _all(context) if name not in used and _is_whole(context, name)]
    for first in range(0, len(left), _AT_ONCE):
        part = left[first : first + _AT_ONCE]
        with ExitStack() as closing:
            descriptors = []
            for name in part:
                descriptors.append(context.state.open(name))
                closing.callback(os.close, descriptors[-1])
            try:
                context.io.call(messages.Unstored(part), descriptors)
            except IoRefused as error:
                if error.errno == errno.EALREADY:
                    raise
                _log.error("what was not stored yet: %s", error)


def remove_unused(context: Context) -> None:
    """Those that no io process has any more, when nothing has to be stored. Raises Failed."""
    # In this order: what is there was being handed over then, or is known to the io process now.
    names = _all(context)
    begun = set(context.buffers)
    inventory = context.io.inventory()
    if inventory.swept:
        for name in set(names) - begun - _in_use(inventory):
            context.state.remove(name)


def _is_whole(context: Context, name: str) -> bool:
    status = context.state.path(name).stat()
    return status.st_size >= BUFFERS_BYTES and status.st_blocks * 512 >= status.st_size


def _all(context: Context) -> list[str]:
    return [name for name in context.state.names() if name.startswith(_PREFIX)]


def _in_use(inventory: messages.Inventory) -> set[str]:
    return {report.buffers for report in inventory.devices if report.buffers}


def _unused_name(context: Context, device: str) -> str:
    taken = {*_all(context), *context.buffers}
    return next(name for number in range(len(taken) + 1) if (name := f"{_PREFIX}{device}.{number}") not in taken)
