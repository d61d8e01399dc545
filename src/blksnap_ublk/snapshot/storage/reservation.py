# SPDX-License-Identifier: MIT
"""Files that helper processes reserve on file systems above filtered devices, and give back (`reserving.py`)."""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from blksnap_ublk.errors import ERROR_CLASSES, BlksnapError, Failed
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.spec import Spec
from blksnap_ublk.snapshot.storage.areas import AreaKind, Identity
from blksnap_ublk.snapshot.storage.beneath import Found, Piece, Seat

RESERVE_LIMIT = 300.0
"""Seconds for allocating a file and writing back its file system."""
_GIVE_BACK_LIMIT = 30.0  # the helper goes on after that
_LOOK = 0.2  # seconds between two looks whether waiting has become vain
_ERRORS = {kind.__name__: kind for kind in ERROR_CLASSES}
_log = logging.getLogger(__name__)
_PROGRAM = "blksnap_ublk.snapshot.storage.reserving"

GivenUp = Callable[[], bool]
"""Says that the filtered device is not served any more, and that nothing is to be waited for that needs it."""


class Reservation:
    """The file of one SPEC, reserved by a helper process.

    `open`, `reserve`, `keep`; `undo` at any time. The helper ends with `close`, and takes back by itself what was not
    to be kept, also when this process has died.
    """

    def __init__(self, spec: Spec, seat: Seat, given_up: GivenUp) -> None:
        self.seat = seat
        self._spec = spec
        self._given_up = given_up
        self._helper = _Helper("reserve", spec.path, given_up)
        self._own: int | None = None
        self._closing = ExitStack()
        self._found: Found | None = None
        self._size = 0

    def open(self) -> tuple[int, Found]:
        """A descriptor of the file, which the caller closes, and what it is. Raises BlksnapError."""
        ranges = None if self._spec.ranges is None else [[each.start, each.count] for each in self._spec.ranges]
        self._helper.tell({"path": self._spec.path, "ranges": ranges, "seat": asdict(self.seat)})
        answer = self._helper.answer(RESERVE_LIMIT)
        descriptor = self._helper.descriptor
        if descriptor is None:
            raise Failed("the helper process sent no file", subject=self._spec.path, advice="see the daemon's log")
        device, inode = answer["identity"]
        self._own = os.dup(descriptor)
        self._found = found = Found(
            kind=AreaKind(answer["kind"]),
            identity=Identity(DeviceNumber(*device), inode),
            size=answer["size"],
            room=answer["room"],
            filesystem=answer["filesystem"],
            publish=answer["publish"],
        )
        return descriptor, found

    def reserve(self, size: int, unit: int) -> tuple[list[Piece], list[str]]:
        """Gives the file `size` bytes for storage of that unit; where they lie, and notes. Raises BlksnapError."""
        self._size = size
        self._helper.tell({"do": "reserve", "size": size, "unit": unit})
        answer = self._helper.answer(RESERVE_LIMIT)
        return [Piece(*each) for each in answer["pieces"]], list(answer["notes"])

    def keep(self) -> None:
        """From now on it stays reserved when this process dies. Raises BlksnapError."""
        self._helper.tell({"do": "keep"})
        self._helper.answer(RESERVE_LIMIT)

    def undo(self) -> None:
        """Takes everything back, but for the open file; waits for that, but not long."""
        self._helper.tell({"do": "undo"})
        with suppress(BlksnapError):  # it goes on by itself, or has undone it all before it said what was wrong
            self._helper.answer(_GIVE_BACK_LIMIT)
        if self._helper.gone and self._found is not None and self._size:
            self._undo_by_another(self._found)

    def close(self) -> None:
        """Ends the helper, which closes the file."""
        if self._own is not None:
            os.close(self._own)
            self._own = None
        self._closing.close()
        self._helper.end()

    def _undo_by_another(self, found: Found) -> None:
        """The helper has died, perhaps with the file reserved."""
        former = None if found.kind is AreaKind.UNNAMED else -1 if found.publish else found.size
        longest = max(self._size, found.size)
        path = self._spec.path
        given = self._closing.enter_context(
            GivingBack(path, found.identity, self._own, former, longest, self._given_up)
        )
        if given.warning is not None:
            _log.error("%s; it may stay immutable: chattr -i %s", given.warning, path)


def verify(path: str, descriptor: int, pieces: Sequence[Piece], given_up: GivenUp) -> str | None:
    """`beneath.verify_pieces` by a helper process, for the file of a path. Raises Failed where it cannot be asked."""
    helper = _Helper("verify", path, given_up, (descriptor,))
    try:
        helper.tell({"path": path, "descriptor": descriptor, "pieces": pieces})
        changed = helper.answer(_GIVE_BACK_LIMIT)["changed"]
    finally:
        helper.end()
    return None if changed is None else str(changed)


class GivingBack:
    """A reserved file on its way back to its file system and its user, as `reserving.give_back`, by a helper process.

    As a context manager: done on entry, `warning` says what was not. The helper has a duplicate of the descriptor that
    it was given, so that it, and never this process, is the last to close the file, after the end of the `with`. What
    it cannot do at once it does later.
    """

    def __init__(
        self,
        path: str,
        identity: Identity,
        descriptor: int | None,
        former_size: int | None,
        longest: int,
        given_up: GivenUp,
    ) -> None:
        self.warning: str | None = None
        self._path = path
        self._order = {
            "path": path,
            "filesystem": list(identity.device),
            "inode": identity.inode,
            "descriptor": descriptor,
            "former_size": former_size,
            "longest": longest,
        }
        self._helper = _Helper("give-back", path, given_up, () if descriptor is None else (descriptor,))

    def __enter__(self) -> GivingBack:
        try:
            self._helper.tell(self._order)
            self._helper.answer(_GIVE_BACK_LIMIT)
        except BlksnapError as error:
            self.warning = error.message if self._path in error.message else f"{self._path}: {error.message}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._helper.end()


class _Helper:
    """One helper process and the socket to it. `descriptor`: the file that came with its first answer.

    `gone`: it has died before it was asked to end.
    """

    def __init__(self, what: str, path: str, given_up: GivenUp, descriptors: Sequence[int] = ()) -> None:
        self._path = path
        self._given_up = given_up
        self._received = b""
        self.descriptor: int | None = None
        self.gone = False
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", _PROGRAM, what, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *descriptors),
                    cwd="/",
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._socket = ours

    def tell(self, order: dict[str, Any]) -> None:
        with suppress(OSError):  # its answer, or the lack of one, says more
            self._socket.sendall(json.dumps(order).encode() + b"\n")

    def answer(self, limit: float) -> dict[str, Any]:
        end = time.monotonic() + limit
        while b"\n" not in self._received:
            if time.monotonic() > end:
                raise Failed(f"its file system has not answered for {limit:.0f} s", subject=self._path)
            if self._given_up():
                raise Failed("the io process died while its file system was waited for", subject=self._path)
            if not self._is_readable(_LOOK):
                continue
            data = self._receive()
            if not data:
                self.gone = True
                raise Failed("the helper process for it has died", subject=self._path, advice="see the daemon's log")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _ERRORS[answer["error"]](answer["message"])
        return answer

    def end(self) -> None:
        """Its end is waited for a while, and not at all where it waits for a device that is not served."""
        self._socket.close()
        end = time.monotonic() + _GIVE_BACK_LIMIT
        while self._process.poll() is None and time.monotonic() < end and not self._given_up():
            try:
                self._process.wait(_LOOK)
            except subprocess.TimeoutExpired:
                continue

    def _is_readable(self, seconds: float) -> bool:
        poller = select.poll()  # select() knows small descriptors only
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(seconds * 1000))

    def _receive(self) -> bytes:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 20, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return b""
        if descriptors:
            self.descriptor = descriptors[0]
        return data
