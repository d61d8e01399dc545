# SPDX-License-Identifier: MIT
"""Regular and unnamed files as difference storage: opening, checks, allocation."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

from blksnap_ublk.errors import Busy, Failed, Unsupported, UsageError, from_os_error
from blksnap_ublk.host import blockdev, extents, filesystem, holders, stack, swap
from blksnap_ublk.host.extents import ExtentFlags
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.host.syscalls import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_WRITE_ZEROES,
    DirectIo,
    fallocate,
    file_status,
)
from blksnap_ublk.snapshot.spec import SECTOR, Spec
from blksnap_ublk.snapshot.storage.areas import AreaKind, Identity
from blksnap_ublk.snapshot.storage.descriptors import DescriptorRegistry
from blksnap_ublk.snapshot.storage.sole_use import only_here
from blksnap_ublk.snapshot.storage.target import Target, refuse_beneath_off_limits, refuse_off_limits

_NOT_IN_PLACE = ExtentFlags.ENCODED | ExtentFlags.INLINE | ExtentFlags.TAIL | ExtentFlags.UNKNOWN
_ZEROES = 1 << 20
_NO_DIRECT_IO = "has no direct I/O, as an encrypted, compressed or data-journalled file"


def open_existing(
    spec: Spec, registry: DescriptorRegistry, closing: ExitStack, off_limits: Collection[DeviceNumber]
) -> Target:
    """Opens and locks a regular file, or shares what this process has of it. Raises BlksnapError."""
    path = spec.path
    with _errors_of(path):
        status = file_status(path)
        if status.immutable or status.append_only:
            which = "immutable" if status.immutable else "append-only"
            letter = "i" if status.immutable else "a"
            raise UsageError(f"the file is {which}", subject=path, advice=f"chattr -{letter} it first")
        for area in swap.swap_areas():
            if (area.device, area.inode) == (status.filesystem, status.inode):
                raise Busy("in use as swap", subject=path, errno="EBUSY", advice=f"swapoff {area.path} first")
        identity = Identity(status.filesystem, status.inode)
        descriptor = registry.acquire(identity, lambda: _open_alone(path, identity))
        closing.callback(registry.release, identity)
        owner = os.fstat(descriptor).st_uid
        if owner:
            text = f"belongs to user {owner}, and what it will hold is as secret as the disk"
            raise UsageError(text, subject=path, advice="name a file of root's, or chown it")
        return _target(spec, descriptor, AreaKind.FILE, off_limits)


def open_unnamed(
    spec: Spec, directory: str, registry: DescriptorRegistry, closing: ExitStack, off_limits: Collection[DeviceNumber]
) -> Target:
    """Makes an empty file, mode 0600, without a name in `directory`. Raises BlksnapError.

    If `directory` is not the path of the SPEC, the file is to get that path by `publish`.
    """
    with _errors_of(spec.path):
        # Checked before the attempt, because most of the others cannot make an unnamed file.
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _type_name(spec.path, handle)
        finally:
            os.close(handle)
        created = _open_direct(directory, os.O_TMPFILE)
        status = os.fstat(created)
        identity = Identity(DeviceNumber.of(status.st_dev), status.st_ino)
        descriptor = registry.acquire(identity, lambda: created)
        closing.callback(registry.release, identity)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        publish = directory != spec.path
        return _target(spec, descriptor, AreaKind.FILE if publish else AreaKind.UNNAMED, off_limits, publish)


def refuse_unusable_blocks(target: Target) -> None:
    """Raises Unsupported when blocks in the ranges of an existing file cannot be overwritten where they are."""
    with _errors_of(target.spec.path):
        for start, length in target.byte_ranges(target.size):
            for extent in extents.extents(target.descriptor, start, length) or ():
                if extent.flags & ExtentFlags.SHARED:
                    text = "shares blocks with another file (reflink)"
                elif extent.flags & _NOT_IN_PLACE:
                    text = "has blocks that cannot be written in place"
                else:
                    continue
                raise Unsupported(text, subject=target.spec.path, advice="name a file of its own")


def allocate(target: Target, size: int, undoing: ExitStack) -> None:
    """Gives the areas of a file space of its own, extending it to `size` bytes. Raises BlksnapError.

    What was extended or filled is taken back by `undoing`.
    """
    descriptor = target.descriptor
    with _errors_of(target.spec.path):
        before = os.fstat(descriptor).st_size
        if size > before:
            undoing.callback(_cut_back, descriptor, before, size)
        for start, length in target.byte_ranges(size):
            for hole, hole_length in extents.holes(descriptor, start, length):
                undoing.callback(
                    _quietly, fallocate, descriptor, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, hole, hole_length
                )
            fallocate(descriptor, 0, start, length)
            mapped = extents.extents(descriptor, start, length)
            if mapped is not None and extents.gaps([(each.start, each.length) for each in mapped], start, length):
                raise Failed("still has holes after fallocate", subject=target.spec.path, advice="name another file")
        if os.fstat(descriptor).st_size < size:  # had space beyond its end
            os.ftruncate(descriptor, size)


def make_private(target: Target, undoing: ExitStack) -> str | None:
    """Takes the file away from everybody but its owner; a line for the user if that changed it."""
    with _errors_of(target.spec.path):
        mode = stat.S_IMODE(os.fstat(target.descriptor).st_mode)
        if not mode & 0o077:
            return None
        os.fchmod(target.descriptor, mode & ~0o077)
        undoing.callback(_quietly, os.fchmod, target.descriptor, mode)
        return f"{target.spec.path}: mode set to {mode & ~0o077:04o}: what it will hold is as secret as the disk"


def publish(target: Target, undoing: ExitStack) -> None:
    """Gives an unnamed file, now complete, the name of its SPEC. Raises BlksnapError."""
    with _errors_of(target.spec.path):
        directory, name = os.path.split(target.spec.path)
        handle = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(f"/proc/self/fd/{target.descriptor}", name, dst_dir_fd=handle, follow_symlinks=True)
        finally:
            os.close(handle)
        undoing.callback(_unlink_if, target.spec.path, target.identity)


def is_written(descriptor: int, start: int, length: int) -> bool:
    """Whether writing a byte range changes no metadata: all of it has space, and has been written before."""
    mapped = extents.extents(descriptor, start, length)
    return mapped is None or not any(each.flags & ExtentFlags.UNWRITTEN for each in mapped)


def unwritten(descriptor: int, start: int, length: int, alignment: int) -> list[tuple[int, int]]:
    """The parts, as (start, length) in bytes, of a byte range that have space and were never written.

    Multiples of `alignment`. Raises OSError.
    """
    found = []
    for extent in extents.extents(descriptor, start, length) or ():
        if extent.flags & ExtentFlags.UNWRITTEN:
            first = -(-max(extent.start, start) // alignment) * alignment
            last = min(extent.start + extent.length, start + length) // alignment * alignment
            if first < last:
                found.append((first, last - first))
    return found


def write_ahead(descriptor: int, start: int, length: int) -> None:
    """Turns allocated space into written space by zeroes, so that later writes wait for no metadata.

    For what `unwritten` gives: `start` and `length` in bytes, multiples of the alignment of its area. Raises OSError.
    """
    try:
        fallocate(descriptor, FALLOC_WRITE_ZEROES, start, length)
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    with mmap.mmap(-1, _ZEROES) as zeroes, memoryview(zeroes) as view:
        position, end = start, start + length
        while position < end:
            with view[: min(_ZEROES, end - position)] as piece:
                position += os.pwrite(descriptor, piece, position)


def open_locked(path: str, identity: Identity) -> int:
    """Opens and locks the regular file of that identity. Raises OSError, Busy, Failed for another file."""
    descriptor = _open_direct(path, 0)
    try:
        status = os.fstat(descriptor)
        if (DeviceNumber.of(status.st_dev), status.st_ino) != identity or not stat.S_ISREG(status.st_mode):
            raise Failed("became another file while it was opened", subject=path, advice="try again")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            named = ", ".join(holders.lock_holders(*identity)) or "another process"
            raise Busy(f"locked by {named}", subject=path, errno="EBUSY", advice="name another file") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_alone(path: str, identity: Identity) -> int:
    """What somebody else has open, as the disk of a virtual machine or behind a loop device, is no storage."""
    descriptor = open_locked(path, identity)
    try:
        with only_here(descriptor, path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _open_direct(path: str, flags: int) -> int:
    flags |= os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o600)  # whether that is good enough, `_target` decides


def _target(
    spec: Spec, descriptor: int, kind: AreaKind, off_limits: Collection[DeviceNumber], publish: bool = False
) -> Target:
    status = file_status(descriptor)
    name = _type_name(spec.path, descriptor)
    beneath = stack.devices_beneath_file(descriptor)
    identity = Identity(status.filesystem, status.inode)
    refuse_off_limits(spec.path, beneath, off_limits)
    refuse_beneath_off_limits(spec.path, identity, off_limits)
    direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
    device = status.filesystem if status.filesystem.major else min(beneath, default=None)
    needs = status.direct_io
    if name == "tmpfs":
        needs = DirectIo(SECTOR, SECTOR)
    elif not direct or needs == DirectIo(0, 0):
        raise Unsupported(_NO_DIRECT_IO, subject=spec.path, advice="name another file or a block device")
    elif needs is None:  # before 6.1 the kernel does not tell
        limits = blockdev.describe_number(status.filesystem).limits
        needs = DirectIo(limits.dma_alignment + 1, limits.logical_block)
    return Target(
        spec=spec,
        kind=kind,
        descriptor=descriptor,
        identity=identity,
        size=status.size,
        alignment=max(needs.offset, SECTOR),
        memory_alignment=needs.memory,
        direct=direct,
        filesystem=name,
        device=device,
        publish=publish,
    )


def _type_name(path: str, descriptor: int) -> str:
    kind = filesystem.type_of(descriptor)
    if kind.objection is not None:
        text = f"lies on {kind.name}, which {kind.objection}"
        raise Unsupported(text, subject=path, advice="name storage on ext4, xfs or tmpfs, or a block device")
    return kind.name


@contextmanager
def _errors_of(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, subject=path) from None


def _cut_back(descriptor: int, former: int, longest: int) -> None:
    with suppress(OSError):
        if os.fstat(descriptor).st_size <= longest:  # else somebody else has written to it
            os.ftruncate(descriptor, former)


def _quietly(function: Callable[..., object], *arguments: int) -> None:
    with suppress(OSError):
        function(*arguments)


def _unlink_if(path: str, identity: Identity) -> None:
    with suppress(OSError):
        status = os.lstat(path)
        if (DeviceNumber.of(status.st_dev), status.st_ino) == identity:
            os.unlink(path)
