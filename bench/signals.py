# SPDX-License-Identifier: MIT
"""Being told to end."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def exit_when_told() -> None:
    """Turns SIGTERM and SIGHUP into exceptions, so that everything that was set up is taken down."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
