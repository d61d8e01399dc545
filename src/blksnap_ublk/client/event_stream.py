# SPDX-License-Identifier: MIT
"""Events in one row, also when the process that sends them is replaced."""

import time
from collections.abc import Callable, Iterator

import msgspec

from blksnap_ublk import calls, forms
from blksnap_ublk.varlink.connection import CallUnread, Connection, ConnectionLost

RECONNECT_SECONDS = 0.1
RECONNECTS = 100
"""Connections in a row that end without an answer."""


def read_events(
    first: Connection, again: Callable[[], Connection], parameters: calls.ReadEvents
) -> Iterator[forms.Event]:
    """The events of one call of ReadEvents on the connection `first`.

    One that follows goes on, where it was, on a connection that `again` makes, and one that nobody read begins there.
    Raises ConnectionLost when nobody serves any more, VarlinkError.
    """
    connection = first
    position: int | None = None
    failed = 0
    while True:
        try:
            with connection:
                for batch in connection.stream(f"{calls.INTERFACE}.ReadEvents", parameters, calls.EventBatch):
                    position, failed = batch.seq, 0
                    yield from batch.events
            return
        except ConnectionLost as error:
            failed += 1
            goes_on = isinstance(error, CallUnread) or (parameters.follow and position is not None)
            if not goes_on or failed > RECONNECTS:
                raise
            time.sleep(RECONNECT_SECONDS)
            try:
                connection = again()
            except OSError:
                raise error from None
            if position is not None:
                parameters = msgspec.structs.replace(parameters, since=position)
