# SPDX-License-Identifier: MIT
"""The target that stands for a file or a block device."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat

from blksnap_ublk import engine
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.host import blockdev, holders, pagecache
from blksnap_ublk.ublk.limits import needs_copy, params_of_block_device, params_of_file, refuse_unservable
from blksnap_ublk.ublk.negotiation import DataPath
from blksnap_ublk.ublk.params import PAGE, SECTOR, Params
from blksnap_ublk.ublk.serving import Backend
from blksnap_ublk.ublk.target import Target

log = logging.getLogger(__name__)


class Loop(Target):
    """A regular file or a block device, as a disk.

    A block device is claimed (O_EXCL), a file is locked (flock). I/O is direct where the file can do that, else it goes
    through the page cache.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        """Raises OSError: EBUSY naming who has it, EOPNOTSUPP for devices that cannot be served, EINVAL for neither."""
        self.path = os.fspath(path)
        self.read_only = read_only
        self._device: engine.Device | None = None
        kind = os.stat(self.path).st_mode
        if not stat.S_ISBLK(kind) and not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "neither a regular file nor a block device", self.path)
        self._limits: blockdev.BlockLimits | None = None
        if stat.S_ISBLK(kind):
            self._limits = _limits(self.path)
            self.needs_copy = needs_copy(self._limits)
        descriptor = _open(self.path, read_only=read_only, claim=self._limits is not None)
        try:
            if self._limits is not None:
                pagecache.flush_disk(blockdev.device_number(self.path))
            self._file = engine.File(descriptor)
        except BlksnapError as error:
            raise OSError(errno.EIO, error.message) from None
        finally:
            os.close(descriptor)
        info = self._file.info
        if self._limits is None and info.direct and info.block > PAGE:
            self._file.close()
            raise OSError(
                errno.EOPNOTSUPP, f"blocks of {info.block} bytes, more than a page, cannot be served", self.path
            )
        self.block = self._limits.logical_block if self._limits else max(info.block if info.direct else 0, SECTOR)
        self.size = info.size - info.size % self.block
        if not self.size:
            self._file.close()
            raise OSError(errno.EINVAL, f"smaller than one block ({self.block} bytes)", self.path)

    def params(self, data_path: DataPath, max_io: int) -> Params:
        if self._limits is None:
            return params_of_file(self.size, self.block, data_path=data_path, max_io=max_io, read_only=self.read_only)
        return params_of_block_device(
            self._limits, self.size, data_path=data_path, max_io=max_io, read_only=self.read_only
        )

    def begin(self, requests: int, max_io: int) -> Backend:
        unit = max(self.block, 4096)
        self._device = engine.Device(size=self.size, block=self.block, unit=unit, origin=self._file)
        return Backend(device=self._device)

    def end(self) -> None:
        if self._device is not None:
            self._device.close()
            self._device = None
        if self._limits is not None and not self._file.closed:
            # what others have read of the origin meanwhile is out of date
            try:
                pagecache.flush_disk(blockdev.device_number(self.path))
            except BlksnapError as error:
                log.warning("%s: its page cache could not be dropped: %s", self.path, error.message)
        self._file.close()


def _limits(path: str) -> blockdev.BlockLimits:
    try:
        limits = blockdev.describe(path).limits
    except BlksnapError as error:
        raise OSError(errno.ENODEV, error.message) from None
    refuse_unservable(limits, path)
    return limits


def _open(path: str, *, read_only: bool, claim: bool) -> int:
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | (os.O_EXCL if claim else 0)
    try:
        descriptor = os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            log.warning("%s: no direct I/O there; data go through the page cache", path)
            descriptor = os.open(path, flags)
        elif error.errno == errno.EBUSY and claim:
            raise _busy(path) from None
        else:
            raise
    if not claim:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EWOULDBLOCK:
                raise OSError(errno.EBUSY, "locked by another program that serves it", path) from None
            raise
    return descriptor


def _busy(path: str) -> OSError:
    with contextlib.suppress(BlksnapError):
        return OSError(errno.EBUSY, holders.busy_error(path, blockdev.device_number(path)).message)
    return OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
