# SPDX-License-Identifier: MIT
"""What the service manager is told, as sd_notify(3) describes it, and what it hands over at a start.

Without one, everything here does nothing. Nothing waits for it: it may itself need a device that we serve.
"""

import ctypes
import logging
import os
import socket
from array import array
from collections import deque
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

FIRST_DESCRIPTOR = 3
"""Descriptors that a service manager hands over begin here."""

QUEUE = 8192
"""Messages that wait because the manager does not read; beyond it the oldest go."""

_WATCHDOG_SHARE = 3
"""The manager hears so many times in the time after which it takes us for dead."""

_ARG_START = 48 - 3
"""Where /proc/PID/stat has the address of the arguments, counted from the state, its third field."""


class ServiceManager:
    """The connection to the manager that runs this process, if there is one. For one thread."""

    def __init__(self, address: str | None = None, *, watchdog: float | None = None) -> None:
        """`address` as in NOTIFY_SOCKET; `watchdog`: seconds of silence after which the manager takes us for dead."""
        self._address = _address(address) if address else None
        self.watchdog_interval = None if watchdog is None or self._address is None else watchdog / _WATCHDOG_SHARE
        self._socket: socket.socket | None = None
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._handed_over: list[tuple[str, int]] = []

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> "ServiceManager":
        """The manager that the environment names. The variables are removed: they are not for children."""
        address = environment.pop("NOTIFY_SOCKET", None)
        watchdog = environment.pop("WATCHDOG_USEC", "")
        environment.pop("WATCHDOG_PID", None)
        manager = cls(address, watchdog=int(watchdog) / 1e6 if watchdog.isdecimal() and int(watchdog) else None)
        manager._handed_over = _handed_over(environment)
        return manager

    @property
    def present(self) -> bool:
        """Whether a manager runs this process; it starts it again when it dies."""
        return self._address is not None

    def ready(self, text: str = "") -> None:
        """The service serves."""
        self.send("READY=1", *([f"STATUS={_line(text)}"] if text else []))

    def status(self, text: str) -> None:
        """What the service is about, in one line."""
        self.send(f"STATUS={_line(text)}")

    def stopping(self) -> None:
        """The service has begun to end."""
        self.send("STOPPING=1")

    def alive(self) -> None:
        """The service works. To be called every `watchdog_interval` seconds."""
        self.send("WATCHDOG=1")

    def main_pid(self, pid: int) -> None:
        """Process `pid` is the service from now on."""
        self.send(f"MAINPID={pid}")

    def extend_timeout(self, seconds: float) -> None:
        """Start or end takes longer: the manager is to wait for at least `seconds` from now on."""
        self.send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def take_handed_over(self) -> list[tuple[str, int]]:
        """The names and descriptors that the manager started this process with, once; the caller closes them."""
        found, self._handed_over = self._handed_over, []
        return found

    def send(self, *lines: str, descriptor: int | None = None) -> None:
        """Send assignments, with a descriptor, which stays the caller's. What cannot be sent now is sent later."""
        if self._address is None:
            return
        message = "\n".join(lines).encode()
        if self.flush() and self._sent(message, [] if descriptor is None else [descriptor]):
            return
        if len(self._waiting) >= QUEUE:
            _close(self._waiting.popleft()[1])
        self._waiting.append((message, [] if descriptor is None else [os.dup(descriptor)]))

    def flush(self) -> bool:
        """Try to send what waits; whether nothing does any more. Otherwise to be called again in a second or so."""
        while self._waiting:
            message, descriptors = self._waiting[0]
            if not self._sent(message, descriptors):
                return False
            _close(self._waiting.popleft()[1])
        return True

    def close(self) -> None:
        """End the connection; what still waits is tried once more."""
        self.flush()
        while self._waiting:
            _close(self._waiting.popleft()[1])
        for _, descriptor in self.take_handed_over():
            os.close(descriptor)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _sent(self, message: bytes, descriptors: Sequence[int]) -> bool:
        """False: the manager is not there or does not read; it may do so later."""
        assert self._address is not None
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        try:
            self._socket.sendmsg([message], passed, 0, self._address)
        except (BlockingIOError, ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as error:
            log.warning("the service manager cannot be told %r: %s", message, error)
        return True


def survive_shutdown() -> None:
    """Mark this process as one that file systems need: the last thing that a shutdown does, after it has unmounted what
    it can, is to kill all processes but those whose first argument begins with `@`, and then to write back the rest."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        address = int(fields[_ARG_START])
        if address and Path("/proc/self/cmdline").read_bytes()[:1].strip(b"\0"):
            ctypes.memset(address, ord("@"), 1)


def _address(text: str) -> str:
    return "\0" + text[1:] if text.startswith("@") else text


def _line(text: str) -> str:
    return " ".join(text.split())


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _handed_over(environment: MutableMapping[str, str]) -> list[tuple[str, int]]:
    pid = environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_PIDFDID", None)
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    numbers = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    for number in numbers:
        os.set_inheritable(number, False)
    return list(zip(names + [""] * len(numbers), numbers, strict=False))
