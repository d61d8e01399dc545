# SPDX-License-Identifier: MIT
"""The hooks of one snapshot, run beside its creation: who holds the locks of devices must not wait for them in vain."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import msgspec

from blksnap_ublk.errors import Failed
from blksnap_ublk.forms import Snapshot
from blksnap_ublk.snapshot import hooks

_LOOK = 0.2  # seconds between two looks whether waiting has become vain
_log = logging.getLogger(__name__)


class HookRun:
    """`before` and then, in any case, `after`; as a context manager it waits at its end for those that run."""

    def __init__(self, directory: Path | None) -> None:
        """`directory` is that of the hooks; None where there are none."""
        self._directory = directory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hooks")
        self._after: Future[list[str]] | None = None

    def __enter__(self) -> HookRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is not None:
            for warning in self.warnings():
                _log.warning("%s", warning)

    def before(self, snapshot: Snapshot, given_up: Callable[[], bool]) -> None:
        """Returns when the hooks have ended. Raises Failed with the message of one that failed.

        Nothing is waited for any more once `given_up()` says so: recovery needs the locks. The hook runs on then.
        """
        if self._directory is None:
            return
        running = self._thread.submit(hooks.run_before, self._directory, msgspec.json.encode(snapshot))
        while not wait([running], _LOOK).done:
            if given_up():
                raise Failed("the io process died while hooks ran", advice="try again")
        running.result()

    def after(self, snapshot: Snapshot, *, taken: bool) -> None:
        """Begins to run the others, and returns."""
        if self._directory is not None:
            data = msgspec.json.encode(snapshot)
            self._after = self._thread.submit(hooks.run_after, self._directory, data, taken=taken)

    def warnings(self) -> list[str]:
        """What went wrong with those after; waits for their end."""
        return [] if self._after is None else self._after.result()
