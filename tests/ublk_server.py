# SPDX-License-Identifier: MIT
"""A process that serves one ublk device, so that a test can signal and kill it.

python ublk_server.py FILE [OPTION=VALUE…]: serves FILE with options of `Device.add`; `recover=ID` takes a device over.
Prints `path data-path` when the disk exists, and whatever it logs to stderr.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from blksnap_ublk import ublk
from blksnap_ublk.ublk import helper


class Server:
    """The process, from the outside. Killed at the end of its `with`, and its device deleted."""

    def __init__(self, file: Path, **options: object) -> None:
        words = [f"{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(file), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, messages = self.process.communicate()
            raise AssertionError(f"the server did not start: {messages}")
        self.path, self.data_path = line.split()
        self.id = int(self.path.removeprefix("/dev/ublkb"))
        while self.process.poll() is None and not self._takes_signals():
            time.sleep(0.01)

    def _takes_signals(self) -> bool:
        """Not before `serve` has begun."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> signal.SIGTERM - 1 & 1)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 60) -> tuple[int, str]:
        """Its exit status and what it logged."""
        _, messages = self.process.communicate(timeout=timeout)
        return self.process.returncode, messages

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        if self.id in ublk.device_ids():
            with contextlib.suppress(OSError):
                helper.stop(self.id, force=True, timeout=10)
            with contextlib.suppress(OSError), ublk.Control() as control:
                control.delete(self.id)


def main(file: str, words: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = dict(word.split("=", 1) for word in words)
    recover = options.pop("recover", None)
    target = ublk.Loop(file)
    if recover is not None:
        device = ublk.Device.recover(target, int(recover))
    else:
        device = ublk.Device.add(
            target,
            queues=int(options.get("queues", "1")),
            data_path=options.get("data_path", "auto"),
            recovery=options.get("recovery", "reissue"),
        )
    with device:
        print(device.path, device.data_path.value, flush=True)
        device.serve()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
