# SPDX-License-Identifier: MIT
"""The helper process that reserves a file on a file system above a filtered device, and the one that gives it back.

It is a process of its own because the file system waits for the filtered device whenever that is not served: the
control process, which serves it again, must never be among those that wait. `reservation.py` starts it and talks to it
in lines of JSON. Until it is told to `keep` the file it takes back what it has done when the other end has gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import Any

from blksnap_ublk.errors import BlksnapError, Failed, Unsupported, from_os_error
from blksnap_ublk.host import extents, filesystem, superblock
from blksnap_ublk.host.inode_flags import InodeFlags, inode_flags, is_realtime, set_immutable
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.spec import SectorRange, Spec
from blksnap_ublk.snapshot.storage import files
from blksnap_ublk.snapshot.storage.areas import AreaKind, Identity
from blksnap_ublk.snapshot.storage.beneath import (
    Found,
    Piece,
    Seat,
    cut,
    refuse_movable,
    refuse_scattered,
    verify_pieces,
)
from blksnap_ublk.snapshot.storage.descriptors import DescriptorRegistry
from blksnap_ublk.snapshot.storage.sole_use import only_here
from blksnap_ublk.snapshot.storage.target import Target

_UNFIT = {
    InodeFlags.ENCRYPTED: "is encrypted by its file system",
    InodeFlags.COMPRESSED: "is compressed by its file system",
    InodeFlags.JOURNALLED: "is written through the journal (chattr +j)",
    InodeFlags.VERITY: "is protected by fs-verity",
    InodeFlags.INLINE: "has data within its inode",
}


class Reserving:
    """The file of one SPEC. `open`, then `reserve`; closing takes back what was done, but after `keep`.

    All raise BlksnapError.
    """

    def __init__(self, spec: Spec, seat: Seat) -> None:
        self._spec = spec
        self._seat = seat
        self._closing, self._undoing = ExitStack(), ExitStack()
        self._registry = DescriptorRegistry()
        self._target: Target | None = None
        self._kept = False

    @property
    def descriptor(self) -> int:
        """Of the file, once it is open."""
        assert self._target is not None
        return self._target.descriptor

    def open(self) -> Found:
        """Opens, locks and checks the file; one without a name where the SPEC is a directory or does not exist."""
        with _errors_of(self._spec.path):
            target = self._target = self._open()
            if target.identity.device != self._seat.filesystem:
                raise Failed("lies on another file system than a moment ago", subject=self._spec.path)
            self._refuse_unfit(target)
            return Found(
                kind=target.kind,
                identity=target.identity,
                size=target.size,
                room=filesystem.room(target.descriptor),
                filesystem=target.filesystem or "",
                publish=target.publish,
            )

    def reserve(self, size: int, unit: int) -> tuple[list[Piece], list[str]]:
        """Gives the file space of its own up to `size` bytes and keeps it from moving; where it lies, and notes.

        All of that is on the disk when this returns. `unit`: that of the storage, in bytes.
        """
        target = self._target
        assert target is not None
        path = self._spec.path
        with _errors_of(path):
            files.refuse_unusable_blocks(target)
            files.allocate(target, size, self._undoing)
            note = None
            if target.kind is AreaKind.FILE and not target.publish:
                note = files.make_private(target, self._undoing)
            if target.publish:
                files.publish(target, self._undoing)
            self._pin(target)
            os.fsync(target.descriptor)
            failure = superblock.write_back(target.descriptor)
            if failure:
                raise OSError(failure, os.strerror(failure))
            pieces = self._pieces(target, size, unit)
            refuse_scattered(pieces, path)
            if self._pieces(target, size, unit) != pieces:
                raise Unsupported("its blocks are being moved", subject=path, advice="name storage on another device")
        return pieces, [note] if note is not None else []

    def keep(self) -> None:
        """From now on `close` leaves what was reserved; `undo` still takes it back."""
        self._kept = True

    def undo(self) -> None:
        """Takes back what was reserved."""
        self._undoing.close()

    def close(self) -> None:
        """Lets go of the file."""
        try:
            if self._kept:
                self._undoing.pop_all()
            self._undoing.close()
        finally:
            self._closing.close()

    def _open(self) -> Target:
        path = self._spec.path
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            directory = os.path.dirname(path)
            return files.open_unnamed(self._spec, directory, self._registry, self._closing, ())
        if stat.S_ISDIR(mode):
            return files.open_unnamed(self._spec, path, self._registry, self._closing, ())
        return files.open_existing(self._spec, self._registry, self._closing, ())

    def _refuse_unfit(self, target: Target) -> None:
        flags = inode_flags(target.descriptor)
        reason = next((text for flag, text in _UNFIT.items() if flags & flag), None)
        if reason is None and is_realtime(target.descriptor):
            reason = "lies on the realtime device of its file system"
        if reason is not None:
            raise Unsupported(reason, subject=self._spec.path, advice="name another file or another device")

    def _pin(self, target: Target) -> None:
        """From now on nobody can open it to write, and nobody has it open so."""
        descriptor = target.descriptor
        with ExitStack() as alone:
            if target.kind is AreaKind.FILE and not target.publish:
                alone.enter_context(only_here(descriptor, self._spec.path))
            self._undoing.callback(_unpin, descriptor)
            set_immutable(descriptor, True)  # who has waited to open it finds it so

    def _pieces(self, target: Target, size: int, unit: int) -> list[Piece]:
        ranges = target.byte_ranges(size)
        found = []
        for start, length in ranges:
            mapped = extents.extents(target.descriptor, start, length)
            if mapped is None:
                text = f"{target.filesystem} does not tell where it lies"
                raise Unsupported(text, subject=self._spec.path, advice="name storage on another device")
            found += mapped
        refuse_movable(found, self._spec.path)
        return cut(sorted(set(found), key=lambda extent: extent.start), self._seat, ranges, unit)


def give_back(path: str, identity: Identity, descriptor: int | None, former_size: int | None, longest: int) -> None:
    """Lets the file system and others have the file again: not immutable, cut back to `former_size` bytes or, if that
    is -1, removed. None: its size stays. Without `descriptor` it is found by `path`, if that still leads to it, and is
    left as it is where somebody else has locked it.

    `longest`: bytes that it was made long; where it is longer than that others have written to it, and its size stays.
    Raises OSError.
    """
    handle = -1
    try:
        if descriptor is None or former_size == -1:
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except (FileNotFoundError, NotADirectoryError):
                handle = -1
            if handle >= 0 and _identity_of(handle) != identity:
                os.close(handle)
                handle = -1
        if descriptor is None and handle < 0:
            return
        if descriptor is None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        at_hand = handle if descriptor is None else descriptor
        set_immutable(at_hand, False)
        if former_size == -1 and handle >= 0:
            os.unlink(path)
        elif former_size is not None and former_size >= 0:
            size = os.fstat(at_hand).st_size
            if size > longest > former_size:
                raise OSError(errno.EFBIG, f"has {size} bytes and was made no longer than {longest}: left as it is")
            if former_size < size <= longest:
                os.truncate(f"/proc/self/fd/{at_hand}", former_size)
    finally:
        if handle >= 0:
            os.close(handle)


def main(arguments: list[str]) -> int:
    """`reserve FD`, `verify FD` or `give-back FD`, with the socket to the control process."""
    what, number = arguments
    with socket.socket(fileno=int(number)) as connection, connection.makefile("rb") as orders:
        connection.set_inheritable(False)
        if what == "verify":
            return _verify(connection, orders)
        if what == "give-back":
            return _give_back(connection, orders)
        return _reserve(connection, orders)


def _reserve(connection: socket.socket, orders: Any) -> int:
    order = _next(orders)
    if order is None:
        return 1
    ranges = order["ranges"]
    spec = Spec(order["path"], None if ranges is None else tuple(SectorRange(*each) for each in ranges))
    seat = Seat(**{**order["seat"], "filesystem": DeviceNumber(*order["seat"]["filesystem"])})
    work = Reserving(spec, seat)
    try:
        found = work.open()
        _answer(connection, asdict(found), work.descriptor)
        while (order := _next(orders)) is not None:
            if order["do"] == "reserve":
                pieces, notes = work.reserve(order["size"], order["unit"])
                _answer(connection, {"pieces": pieces, "notes": notes})
            elif order["do"] == "keep":
                work.keep()
                _answer(connection, {})
            elif order["do"] == "undo":
                work.undo()
                _answer(connection, {})
    except BlksnapError as error:
        work.undo()
        _answer(connection, {"error": type(error).__name__, "message": error.message})
        _wait(orders)
        return 1
    finally:
        work.close()
    return 0


def _give_back(connection: socket.socket, orders: Any) -> int:
    order = _next(orders)
    if order is None:
        return 1
    descriptor = order["descriptor"]
    identity = Identity(DeviceNumber(*order["filesystem"]), order["inode"])
    try:
        give_back(order["path"], identity, descriptor, order["former_size"], order["longest"])
    except OSError as error:
        _answer(connection, {"error": "Failed", "message": str(from_os_error(error, subject=order["path"]))})
    else:
        _answer(connection, {})
    _wait(orders)
    return 0


def _next(orders: Any) -> dict[str, Any] | None:
    """The next order; None when nobody is there any more."""
    line = orders.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def _verify(connection: socket.socket, orders: Any) -> int:
    order = _next(orders)
    if order is None:
        return 1
    try:
        changed = verify_pieces([Piece(*each) for each in order["pieces"]], order["descriptor"])
    except OSError as error:
        _answer(connection, {"error": "Failed", "message": str(from_os_error(error, subject=order["path"]))})
    else:
        _answer(connection, {"changed": changed})
    _wait(orders)
    return 0


def _wait(orders: Any) -> None:
    """Until the other end has closed its descriptors of the file, and is not the one who waits for its end."""
    while orders.readline():
        pass


def _answer(connection: socket.socket, answer: dict[str, Any], descriptor: int | None = None) -> None:
    data = json.dumps(answer).encode() + b"\n"
    with suppress(BrokenPipeError, ConnectionResetError):  # the next read sees that it has gone
        if descriptor is not None:
            sent = socket.send_fds(connection, [data], [descriptor])
            data = data[sent:]
        connection.sendall(data)


def _identity_of(descriptor: int) -> Identity:
    status = os.fstat(descriptor)
    return Identity(DeviceNumber.of(status.st_dev), status.st_ino)


def _unpin(descriptor: int) -> None:
    with suppress(OSError):
        set_immutable(descriptor, False)


@contextmanager
def _errors_of(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, subject=path) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
