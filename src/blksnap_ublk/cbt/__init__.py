# SPDX-License-Identifier: MIT
"""Change tracking: which blocks of a device changed between its snapshots (numpy on mapped files)."""

from blksnap_ublk.cbt.bitmap import Bitmap
from blksnap_ublk.cbt.changes import Changes
from blksnap_ublk.cbt.cursor import Cursor
from blksnap_ublk.cbt.errors import HistoryDamaged, HistoryError, NoSuchSnapshot
from blksnap_ublk.cbt.fold import FoldPolicy
from blksnap_ublk.cbt.history import History

__all__ = [
    "Bitmap",
    "Changes",
    "Cursor",
    "FoldPolicy",
    "History",
    "HistoryDamaged",
    "HistoryError",
    "NoSuchSnapshot",
]
