# SPDX-License-Identifier: MIT
"""Freezes the file systems mounted from a set of devices for the moment of a snapshot, by two helper processes.

The freezer (`freezer.py`) freezes and thaws. Its watchdog (`watchdog.py`) thaws in its place when it has died, when
this process has died, or when a limit has passed. What is frozen stands in memory that all three share
(`freeze_board.py`).
"""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from blksnap_ublk.errors import Failed
from blksnap_ublk.host import mounts, stack
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.freeze_board import Board, Reason
from blksnap_ublk.snapshot.freeze_order import FileSystem, file_systems, in_freezing_order

FREEZE_LIMIT = 10.0
"""Seconds after the first freeze at which everything is thawed."""
_WRITE_BACK_LIMIT = 300.0  # seconds for opening, and for writing back what is dirty
_MARGIN = 10.0  # seconds beyond FREEZE_LIMIT in which the helpers answer
_LOOK = 0.2  # seconds between two looks whether waiting has become vain
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1)); from blksnap_ublk.snapshot.watchdog import main; sys.exit(main())"
)
_PACKAGES = str(Path(__file__).resolve().parents[2])
_NOTHING: Mapping[DeviceNumber, DeviceNumber] = MappingProxyType({})
_MEANING = {
    errno.ETIME: "the time for freezing was over",
    errno.ENOENT: "no mount of it can be reached",
    errno.ESTALE: "its mount has gone or is hidden beneath another one",
}


def mounted_on(
    numbers: Iterable[DeviceNumber],
    storages: Iterable[DeviceNumber] = (),
    *,
    origins: Mapping[DeviceNumber, DeviceNumber] = _NOTHING,
) -> list[FileSystem]:
    """The writable file systems above devices, of all mount namespaces, each once, in the order of freezing.

    `storages`: `st_dev` of file systems that hold difference storage; those come last. `origins`: the origin of each
    filtered device, for those that are stacked, because the kernel does not tell. Raises Unsupported for file systems
    that rest on one another in a circle.
    """
    beneath = stack.beneath_each()
    for filtered, origin in origins.items():
        beneath[filtered] = beneath.get(filtered, frozenset()) | {origin}
    members = frozenset(numbers)
    devices = members | stack.all_above(members, beneath)
    systems = file_systems(mounts.all_mounts(), devices, mounts.devices_of, mounts.carrying_devices())
    return in_freezing_order(systems, beneath, storages)


class Freezer:
    """Context manager around the moment of a snapshot: started on entry, thawed at the latest on exit.

    `freeze()` and `thaw()` are called in between. `warnings` says which file system could not be frozen and why.
    `systems` are frozen in their order, and thawed in the opposite one. Nothing is waited for any more once
    `given_up()` says so: a device whose server has died does not come back as long as an operation holds its lock. The
    helpers thaw all the same as soon as they can.
    """

    def __init__(self, systems: Sequence[FileSystem], given_up: Callable[[], bool] = lambda: False) -> None:
        self._systems = list(systems)
        self._given_up = given_up
        self._helper: subprocess.Popen[bytes] | None = None
        self._memory = -1
        self._board: Board | None = None
        self.warnings: list[str] = []

    def __enter__(self) -> Freezer:
        if self._systems:
            self._memory = Board.create(len(self._systems))
            try:
                self._board = Board(self._memory, len(self._systems))
                self._helper = self._start(thaw=False)
                self._answer(_WRITE_BACK_LIMIT)
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
        self._answer(_WRITE_BACK_LIMIT)
        results = self._answer(FREEZE_LIMIT + _MARGIN)["results"]
        complete = True
        for system, result in zip(self._systems, results, strict=True):
            if result == errno.EBUSY:
                self.warnings.append(f"{system.point}: already frozen by somebody else; left as it is")
            elif result != 0:
                complete = False
                self.warnings.append(f"{system.point}: {system.type} was not frozen: {_text(result)}")
        return complete

    def thaw(self) -> bool:
        """Thaws; False when the helpers had to do so before they were told: then the moment may have been missed.

        Raises nothing: what was taken is taken.
        """
        if self._helper is None:
            return True
        self._tell()
        try:
            answer = self._answer(FREEZE_LIMIT + _MARGIN)
        except Failed as error:
            self.warnings.append(f"{', '.join(system.point for system in self._systems)}: {error.message}")
            return False
        return not answer["late"]

    def _start(self, *, thaw: bool) -> subprocess.Popen[bytes]:
        job = os.memfd_create("freeze-job", os.MFD_CLOEXEC)
        try:
            systems = [[(mount.mount_id, mount.path) for mount in system.mounts] for system in self._systems]
            with open(job, "wb", closefd=False) as file:
                file.write(json.dumps({"systems": systems, "limit": FREEZE_LIMIT, "thaw": thaw}).encode())
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, _PACKAGES, str(self._memory), str(job)],
                stdin=subprocess.DEVNULL if thaw else subprocess.PIPE,
                stdout=subprocess.DEVNULL if thaw else subprocess.PIPE,
                bufsize=0,
                pass_fds=[self._memory, job],
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(job)

    def _tell(self) -> None:
        with suppress(BrokenPipeError):  # what it did is in the answer, or it has none
            _stdin(self._helper).write(b"\n")

    def _answer(self, limit: float) -> dict[str, Any]:
        end = time.monotonic() + limit
        line = b""
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0:
                advice = "use --no-freeze, or find what holds it up"
                raise Failed(f"freezing took longer than {limit:.0f} s", advice=advice)
            piece = self._read(1, min(left, _LOOK))  # not a byte of the next answer
            if piece is None:
                if self._given_up():
                    raise Failed("the io process died while file systems were frozen", advice="try again")
                continue
            if not piece:
                assert self._board is not None
                if self._board.reason is Reason.LIMIT:
                    raise Failed(f"thawed by the watchdog after {FREEZE_LIMIT:g} s")
                raise Failed("the helper process that freezes file systems has died", advice="see the daemon's log")
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _read(self, size: int, seconds: float) -> bytes | None:
        """What the freezer writes; empty when it is gone, None when it says nothing."""
        stdout = _stdout(self._helper)
        return os.read(stdout.fileno(), size) if _is_readable(stdout, seconds) else None

    def _end(self) -> None:
        helper, self._helper = self._helper, None
        board, self._board = self._board, None
        try:
            if helper is not None and board is not None:
                self._wait(helper, board)
        finally:
            if board is not None:
                board.close()
            if self._memory >= 0:
                os.close(self._memory)
                self._memory = -1

    def _wait(self, helper: subprocess.Popen[bytes], board: Board) -> None:
        """Until both have gone: they may wait in the kernel, and thaw as soon as that lets them."""
        _stdin(helper).close()
        stdout = _stdout(helper)
        end = time.monotonic() + FREEZE_LIMIT + _MARGIN
        gone = False
        while not (gone and helper.poll() is not None) and time.monotonic() < end and not self._given_up():
            if gone:
                with suppress(subprocess.TimeoutExpired):
                    helper.wait(_LOOK)
            elif _is_readable(stdout, _LOOK):
                gone = not os.read(stdout.fileno(), 4096)
        stdout.close()
        if not gone or helper.poll() is None:
            return
        left = ", ".join(self._systems[n].point for n in board.to_thaw())
        if left and helper.returncode < 0:
            # Both were killed. Nobody waits for this one: it may have to for the device.
            self._start(thaw=True)
        elif left:
            self.warnings.append(f"{left}: could not be thawed; run fsfreeze -u")


def _is_readable(file: IO[bytes], seconds: float) -> bool:
    poller = select.poll()  # select() knows small descriptors only
    poller.register(file, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _text(result: int) -> str:
    name = errno.errorcode.get(result, str(result))
    return _MEANING.get(result) or f"{os.strerror(result)} ({name})"


def _stdin(helper: subprocess.Popen[bytes] | None) -> IO[bytes]:
    assert helper is not None
    assert helper.stdin is not None
    return helper.stdin


def _stdout(helper: subprocess.Popen[bytes] | None) -> IO[bytes]:
    assert helper is not None
    assert helper.stdout is not None
    return helper.stdout
