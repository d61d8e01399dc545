# SPDX-License-Identifier: MIT
"""Heavy writes that go on in the background: fio that verifies what it wrote, files that come and go, fstrim."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from pathlib import Path
from types import TracebackType

from demo.narration import NotAsPromised

TRIM_EVERY = 3.0
FILES = 40


class Load:
    """Context manager: the load runs inside of it. `rounds` counts the runs of fio that ended without an error.

    On leaving it waits for what is under way, and raises NotAsPromised if fio or a file operation failed.
    """

    def __init__(self, directory: Path, size: int) -> None:
        """`size`: bytes that fio writes and verifies in one round."""
        self._directory = directory
        self._size = size
        self._stop = threading.Event()
        self._failures: list[str] = []
        self._threads = [
            threading.Thread(target=self._guarded, args=(part,), name=part.__name__)
            for part in (self._fio, self._churn, self._trim)
        ]
        self.rounds = 0
        self.files = 0
        self.trims = 0

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if error is None:
            self.check()

    def check(self) -> None:
        """Raises NotAsPromised if anything has failed so far."""
        if self._failures:
            raise NotAsPromised("; ".join(self._failures))

    def wait_for_round(self, limit: float) -> None:
        """Returns when fio has ended one more round without an error. Raises NotAsPromised."""
        wanted = self.rounds + 1
        for _ in range(int(limit * 10)):
            self.check()
            if self.rounds >= wanted:
                return
            self._stop.wait(0.1)
        raise NotAsPromised(f"fio did not end a round of {self._size} bytes within {limit:.0f} s")

    def _guarded(self, part: object) -> None:
        assert callable(part)
        try:
            part()
        except (OSError, NotAsPromised) as error:
            self._failures.append(f"load: {error}")

    def _fio(self) -> None:
        while not self._stop.is_set():
            done = subprocess.run(
                [
                    "fio",
                    "--name=load",
                    f"--directory={self._directory}",
                    f"--size={self._size}",
                    "--rw=randwrite",
                    "--bsrange=4k-64k",
                    "--blockalign=4k",
                    "--ioengine=psync",
                    "--direct=1",
                    "--verify=crc32c",
                    "--verify_fatal=1",
                    "--verify_state_save=0",
                    "--fallocate=none",
                    f"--randseed={random.randrange(1 << 30)}",
                    "--output-format=terse",
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                raise NotAsPromised(f"fio ended with {done.returncode}: {done.stderr.strip()} {done.stdout[-400:]}")
            self.rounds += 1

    def _churn(self) -> None:
        """Files are created, written, renamed and deleted."""
        directory = self._directory / "churn"
        directory.mkdir(exist_ok=True)
        while not self._stop.wait(0.02):
            path = directory / f"file{random.randrange(FILES)}"
            if path.exists() and random.random() < 0.4:
                path.unlink()
            elif path.exists() and random.random() < 0.5:
                path.rename(directory / f"file{random.randrange(FILES)}")
            else:
                path.write_bytes(os.urandom(random.randrange(1, 256 << 10)))
            self.files += 1

    def _trim(self) -> None:
        while not self._stop.wait(TRIM_EVERY):
            done = subprocess.run(["fstrim", str(self._directory)], capture_output=True, text=True)
            if done.returncode != 0 and "not supported" not in done.stderr:
                raise NotAsPromised(f"fstrim: {done.stderr.strip()}")
            self.trims += done.returncode == 0
