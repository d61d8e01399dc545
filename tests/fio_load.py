# SPDX-License-Identifier: MIT
"""fio that writes and verifies in the background while a test does something else."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.own_daemon import wait_until

LIMIT = 300.0
"""Seconds for a round of fio on a slow machine."""


class FioLoad:
    """Rounds of random writes, each verified at its end, until it is told to stop."""

    def __init__(self, path: str, size: str, options: tuple[str, ...]) -> None:
        self.rounds = 0
        """How many have ended without an error."""
        self._command = [
            *("fio", "--name=load", f"--filename={path}", "--ioengine=libaio", "--iodepth=16", "--direct=1"),
            *("--rw=randwrite", "--bsrange=4k-64k", f"--size={size}", "--verify=crc32c", "--verify_fatal=1"),
            *("--do_verify=1", "--verify_state_save=0", "--minimal", *options),
        ]
        self._failure: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def check(self) -> None:
        """Fails if fio has failed."""
        assert self._failure is None, self._failure

    def wait_for_round(self) -> None:
        """Returns when one more round has ended well."""
        wanted = self.rounds + 1
        wait_until("fio ends a round", lambda: self._failure is not None or self.rounds >= wanted)
        self.check()

    def stop(self) -> None:
        """Returns when the present round has ended."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set() and self._failure is None:
            command = [*self._command, f"--randseed={self.rounds + 1}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd="/", check=False)
            if done.returncode == 0:
                self.rounds += 1
            else:
                self._failure = f"{' '.join(command)}: {done.returncode} {done.stdout[-400:]}{done.stderr}"


@contextmanager
def fio_load(path: str, *options: str, size: str = "16m") -> Iterator[FioLoad]:
    """The load runs as long as the block; everything that it wrote must have been read back."""
    load = FioLoad(path, size, options)
    try:
        yield load
    finally:
        load.stop()
    load.check()
