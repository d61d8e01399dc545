# SPDX-License-Identifier: MIT
"""Taking back the steps of an operation that failed."""

from __future__ import annotations

import logging
from collections.abc import Callable

from blksnap_ublk.cbt import HistoryError
from blksnap_ublk.errors import BlksnapError

_log = logging.getLogger(__name__)


def quietly(function: Callable[..., object], *arguments: object) -> None:
    """For a step back: its own failure is only logged, so that the other steps are made and the first error is told."""
    try:
        function(*arguments)
    except (OSError, BlksnapError, HistoryError) as error:
        _log.warning("while undoing a failed operation: %s", error)
