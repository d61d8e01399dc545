# SPDX-License-Identifier: MIT
"""What change tracking raises. A malformed cursor or size is a plain ValueError; a failing file system an OSError."""


class HistoryError(Exception):
    """Base of the errors of a change history; the text is one line for people."""


class HistoryDamaged(HistoryError):
    """The files of a history are missing, torn, of another version or do not belong together.

    What remains is not used. `History.create(..., reason="damaged")` begins again, and answers "all" for what was.
    """


class NoSuchSnapshot(HistoryError):
    """Changes were asked up to, or a call names, a snapshot that is neither held nor the last one taken."""
