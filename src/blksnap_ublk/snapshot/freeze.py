# SPDX-License-Identifier: MIT
"""Freezes the file systems mounted from a set of devices for the moment of a snapshot, by a helper process."""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from blksnap_ublk.errors import Failed
from blksnap_ublk.host import mounts, stack
from blksnap_ublk.host.number import DeviceNumber

FREEZE_LIMIT = 10.0
"""Seconds after which the helper thaws by itself."""
_PREPARE_LIMIT = 60.0  # seconds for writing back what is dirty and for freezing
_LOOK = 0.2  # seconds between two looks whether waiting has become vain
_HELPER = Path(__file__).with_name("freezer.py")


def mounted_on(numbers: Iterable[DeviceNumber]) -> list[mounts.Mount]:
    """The writable mounts of all namespaces above the devices, one for each file system."""
    found: dict[DeviceNumber, mounts.Mount] = {}
    for number in numbers:
        for mount in stack.mounts_above(number):
            if not mount.read_only:
                found.setdefault(mount.device, mount)
    return list(found.values())


class Freezer:
    """Context manager around the moment of a snapshot: started on entry, thawed at the latest on exit.

    `freeze()` and `thaw()` are called in between. `warnings` says which file system could not be frozen and why.
    Nothing is waited for any more once `given_up()` says so: a device whose server has died does not come back as long
    as an operation holds its lock. The helper thaws all the same as soon as it can.
    """

    def __init__(self, mounted: list[mounts.Mount], given_up: Callable[[], bool] = lambda: False) -> None:
        self._mounts = mounted
        self._given_up = given_up
        self._frozen: list[mounts.Mount] = []
        self._helper: subprocess.Popen[bytes] | None = None
        self.warnings: list[str] = []

    def __enter__(self) -> Freezer:
        if self._mounts:
            self._helper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_HELPER), str(FREEZE_LIMIT), *map(_seen_from_here, self._mounts)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
            try:
                self._answer(_PREPARE_LIMIT)
            except BaseException:
                self._end()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def freeze(self) -> bool:
        """Freezes; True when every file system is frozen, also where there is none. Raises Failed."""
        if self._helper is None:
            return True
        self._tell()
        results = self._answer(_PREPARE_LIMIT).get("results")
        if not isinstance(results, list) or len(results) != len(self._mounts):
            raise Failed("the helper process that freezes file systems gave a wrong answer")
        complete = True
        for mount, result in zip(self._mounts, results, strict=True):
            if result == 0:
                self._frozen.append(mount)
            elif result == errno.EBUSY:
                self.warnings.append(f"{mount.point}: already frozen by somebody else; left as it is")
            else:
                complete = False
                name = errno.errorcode.get(result, str(result))
                text = f"{mount.filesystem} was not frozen: {os.strerror(result)} ({name})"
                self.warnings.append(f"{mount.point}: {text}")
        return complete

    def thaw(self) -> bool:
        """Thaws; False when the helper had to do so before it was told: then the moment may have been missed.

        Raises nothing: what was taken is taken. A helper that has died is replaced.
        """
        if self._helper is None:
            return True
        self._tell()
        try:
            answer = self._answer(_PREPARE_LIMIT)
        except Failed as error:
            self.warnings.append(f"{', '.join(mount.point for mount in self._mounts)}: {error.message}")
            return False
        for mount, result in zip(self._mounts, answer.get("thawed") or [], strict=False):
            if result not in (0, errno.EINVAL):
                self.warnings.append(f"{mount.point}: could not be thawed: {os.strerror(result)}; run fsfreeze -u")
        return not answer.get("late")

    def _tell(self) -> None:
        with suppress(BrokenPipeError):  # what it did is in the answer, or it has none
            _stdin(self._helper).write(b"\n")

    def _answer(self, limit: float) -> dict[str, list[int]]:
        stdout = _stdout(self._helper)
        end = time.monotonic() + limit
        line = b""
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0:
                advice = "use --no-freeze, or find what holds it up"
                raise Failed(f"freezing took longer than {limit:.0f} s", advice=advice)
            if not select.select([stdout], [], [], min(left, _LOOK))[0]:
                if self._given_up():
                    raise Failed("the io process died while file systems were frozen", advice="try again")
                continue
            piece = os.read(stdout.fileno(), 4096)
            if not piece:
                raise Failed("the helper process that freezes file systems has died", advice="see the daemon's log")
            line += piece
        answer: dict[str, list[int]] = json.loads(line)
        return answer

    def _end(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        _stdin(helper).close()
        _stdout(helper).close()
        end = time.monotonic() + _PREPARE_LIMIT
        # It may wait in the kernel, and thaws as soon as that lets it.
        while helper.poll() is None and time.monotonic() < end and not self._given_up():
            with suppress(subprocess.TimeoutExpired):
                helper.wait(_LOOK)
        if self._frozen and helper.poll() not in (None, 0):
            # It died; one that still waits thaws by itself. Nobody waits for the other: it may have to for the device.
            command = [sys.executable, "-I", "-S", str(_HELPER), "thaw", *map(_seen_from_here, self._frozen)]
            subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _seen_from_here(mount: mounts.Mount) -> str:
    return f"/proc/{mount.pid}/root{mount.point}" if mount.pid else mount.point


def _stdin(helper: subprocess.Popen[bytes] | None) -> IO[bytes]:
    assert helper is not None
    assert helper.stdin is not None
    return helper.stdin


def _stdout(helper: subprocess.Popen[bytes] | None) -> IO[bytes]:
    assert helper is not None
    assert helper.stdout is not None
    return helper.stdout
