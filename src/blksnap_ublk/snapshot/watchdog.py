# SPDX-License-Identifier: MIT
"""The helper process that sees to it that nothing stays frozen; the parent of the freezer.

`main` gets the descriptors of a board and of a job as arguments: it opens the file systems, starts the freezer and
waits. It thaws what the freezer has frozen, and only that, when the freezer has died, when the control process has died
and the freezer does not thaw, and when the limit has passed and the freezer does not thaw. It repeats that until the
freezer is gone, because a FIFREEZE under way may still come through. With status 0 nothing is frozen any more.

Two moments cannot be told apart from outside: a freezer killed right before or after its FIFREEZE or FITHAW. If
somebody else freezes the same file system in just that moment, the watchdog thaws that too. When watchdog, freezer and
control process are all killed in one moment, file systems stay frozen until somebody runs `fsfreeze -u`.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

from blksnap_ublk.host import superblock
from blksnap_ublk.snapshot.freeze_board import Board, Reason, Stage
from blksnap_ublk.snapshot.freezer import FreezerProcess, make_resident

GRACE = 1.0
"""Seconds that a freezer has to thaw by itself."""
_LOOK = 0.1  # seconds between two looks at the board
_AGAIN = 0.02  # seconds between two attempts to thaw
_TRYING = 10.0  # seconds for which thawing is tried again when it fails
_ORDERS, _ANSWERS = 0, 1


def main() -> int:
    board_descriptor, job_descriptor = map(int, sys.argv[1:])
    with open(job_descriptor, "rb") as file:
        file.seek(0)
        job = json.loads(file.read())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    systems = [_open(mounts) for mounts in job["systems"]]
    board = Board(board_descriptor, len(systems))
    if job["thaw"]:
        return Watchdog(systems, board, None).thaw()
    ready, is_ready = os.pipe()
    freezer = os.fork()
    if freezer == 0:
        os.close(is_ready)
        status = 1
        try:
            process = FreezerProcess(systems, board, job["limit"], orders=_ORDERS, answers=_ANSWERS)
            status = process.run(ready)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(ready)
    os.close(_ANSWERS)  # their end is the end of the freezer
    handle = os.pidfd_open(freezer)
    make_resident("bsu-watchdog")
    with suppress(OSError):
        os.write(is_ready, b"\n")
    return Watchdog(systems, board, handle).run(job["limit"])


class Watchdog:
    """`systems` as for the freezer; `freezer`: a pidfd of it, None when it is gone."""

    def __init__(self, systems: Sequence[int], board: Board, freezer: int | None) -> None:
        self._systems = systems
        self._board = board
        self._freezer = freezer

    def run(self, limit: float) -> int:
        """Waits, and does what is needed; the exit status."""
        reason = self._wait(limit)
        if reason is not Reason.FREEZER_GONE:
            self._board.reason = reason  # it freezes no more, should it still be able to
            assert self._freezer is not None
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._freezer, signal.SIGKILL)
        elif self._board.to_thaw():
            self._board.reason = reason
        return self.thaw()

    def _wait(self, limit: float) -> Reason:
        poller = select.poll()
        poller.register(_ORDERS, 0)  # reports only that the control process has closed it
        assert self._freezer is not None
        poller.register(self._freezer, select.POLLIN)
        end, why = None, Reason.LIMIT
        while True:
            reported = [descriptor for descriptor, _ in poller.poll(_LOOK * 1000)]
            if self._freezer in reported:
                return Reason.FREEZER_GONE
            now = time.monotonic()
            if _ORDERS in reported:
                poller.unregister(_ORDERS)
                end, why = now + GRACE, Reason.CONTROL_GONE
            elif end is None and self._board.has_begun:
                end = now + limit + GRACE
            if end is not None and now >= end:
                return why

    def thaw(self) -> int:
        """Thaws until the freezer is gone and nothing is left; the exit status, 1 if that cannot be had."""
        end = None
        while True:
            gone = self._is_gone()  # asked first: what it did last is then seen
            for n in self._board.to_thaw():
                stage = self._board.stage(n)
                result = superblock.thaw(self._systems[n]) if self._systems[n] >= 0 else -self._systems[n]
                # EINVAL: not frozen, and that is final unless it is still on its way.
                if result == 0 or (result == errno.EINVAL and (gone or stage is Stage.FROZEN)):
                    self._board.settle(n)
            if gone:
                end = end or time.monotonic() + _TRYING
                if not self._board.to_thaw():
                    return 0
                if time.monotonic() >= end:
                    return 1
            time.sleep(_AGAIN)

    def _is_gone(self) -> bool:
        if self._freezer is None:
            return True
        return bool(select.select([self._freezer], [], [], 0)[0])


def _open(mounts: list[tuple[int, str]]) -> int:
    """A descriptor of a file system by the first of its mounts that can be reached, or a negative errno."""
    result = -errno.ENOENT
    for mount_id, path in mounts:
        try:
            return superblock.open_mount(path, mount_id)
        except OSError as error:
            result = -(error.errno or errno.EIO)
    return result
