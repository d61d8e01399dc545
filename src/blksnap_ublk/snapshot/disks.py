# SPDX-License-Identifier: MIT
"""The ublk devices of filtered devices and images: added, started, stopped, deleted; the io process serves them."""

from __future__ import annotations

import errno
import os
import secrets
import time
import zlib
from pathlib import Path

from blksnap_ublk.errors import Busy, Failed, from_os_error
from blksnap_ublk.host.blockdev import BlockDevice
from blksnap_ublk.snapshot.catalogue import Served
from blksnap_ublk.ublk import control_plane, helper, holding
from blksnap_ublk.ublk.control import Control
from blksnap_ublk.ublk.device_info import DESC_SIZE, DeviceInfo, DeviceState
from blksnap_ublk.ublk.limits import needs_copy, params_of_block_device
from blksnap_ublk.ublk.negotiation import DataPath, Wish, settle

# `server_flags` of every ublk device of ours: this tag, its mark, a checksum of the runtime directory.
_TAG = 0xB5AC << 48
_MARK_SHIFT, _MARK_BITS = 32, 16
_MARK = (1 << _MARK_BITS) - 1 << _MARK_SHIFT
IMAGE_DEPTH = 64
_NODE_LIMIT = 10.0  # seconds for udev or devtmpfs to make a node
_RECOVERY_LIMIT = 60.0  # seconds for the queues of another io process to be taken into use
_STOP_LIMIT = 60.0  # seconds for the requests in flight


class Disks:
    """Adds, starts, stops and deletes the ublk devices of one daemon."""

    def __init__(self, control: Control, runtime: Path) -> None:
        """`runtime` is the runtime directory: devices of a daemon with another one are left alone."""
        self._control = control
        self._tag = _TAG | zlib.crc32(bytes(runtime.absolute()))

    def add_filtered(self, origin: BlockDevice, queues: int, depth: int) -> Served:
        """Adds the ublk device of a filtered device. Raises OSError, and leaves nothing then."""
        return self._add(origin, Wish(), queues, depth, read_only=False)

    def add_image(self, origin: BlockDevice) -> Served:
        """Adds the ublk device of an image of `origin`: read-only, one queue, if possible without a partition scan."""
        return self._add(origin, Wish(part_scan=False), 1, IMAGE_DEPTH, read_only=True)

    def start(self, ublk_id: int, pid: int) -> None:
        """Makes the disk of a device whose queues process `pid` has armed; its node is there then. Raises OSError."""
        control_plane.start_device(self._control, ublk_id, pid)
        wait_for_node(f"/dev/ublkb{ublk_id}")

    def stop(self, ublk_id: int) -> None:
        """Removes the disk, in use or not, without writing back: for images, which are read-only, and to undo a start.

        Its users get errors. Nothing happens where there is none. Raises OSError.
        """
        try:
            self._control.stop(ublk_id, timeout=_STOP_LIMIT)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def delete(self, ublk_id: int, *, in_use: bool = False) -> None:
        """Forgets a ublk device that is stopped and closed; nothing happens where there is none. Raises OSError.

        With `in_use` it does not wait for those who still have the disk open: the device goes when they close it.
        """
        if in_use:
            control_plane.discard_unstarted(self._control, ublk_id)
        else:
            control_plane.delete_device(self._control, ublk_id)

    def state_of(self, served: Served) -> DeviceState | None:
        """The kernel's state of this device; None where it is gone, its id in use again or not. Raises OSError."""
        try:
            info = self._control.info(served.ublk_id)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return info.state if self._is_ours(info) and _mark_of(info) == served.mark else None

    def served_as(self, ublk_id: int) -> Served:
        """What a device that exists is served with, where only the kernel remembers. Raises OSError."""
        info = self._control.info(ublk_id)
        params = self._control.get_params(ublk_id)
        # The DMA alignment is a parameter of devices on the zero-copy way only.
        return _served(info, zero_copy=params.dma_alignment is not None)

    def begin_recovery(self, ublk_id: int, seconds: float) -> None:
        """Takes a device from a dead io process, as soon as its last I/O has ended.

        Raises OSError; TimeoutError when that has not come after so many seconds.
        """
        control_plane.start_recovery(self._control, ublk_id, timeout=seconds)

    def end_recovery(self, ublk_id: int, pid: int) -> None:
        """Requests go on, to process `pid`, which has armed its queues. Raises OSError."""
        self._control.end_recovery(ublk_id, pid, timeout=_RECOVERY_LIMIT)

    def ours(self) -> list[DeviceInfo]:
        """All ublk devices of ours that exist, those of interrupted attempts included. Raises OSError."""
        return [info for info in self._control.devices() if self._is_ours(info)]

    def _is_ours(self, info: DeviceInfo) -> bool:
        return info.server_flags & ~_MARK == self._tag

    def _add(self, origin: BlockDevice, wish: Wish, queues: int, depth: int, *, read_only: bool) -> Served:
        flags = self._tag | secrets.randbits(_MARK_BITS) << _MARK_SHIFT
        added = control_plane.create_device(self._control, wish, queues=queues, depth=depth, server_flags=flags)
        try:
            data_path = settle(wish, added.flags, target_needs_copy=needs_copy(origin.limits))
            params = params_of_block_device(
                origin.limits, origin.size, data_path=data_path, max_io=added.max_io_bytes, read_only=read_only
            )
            self._control.set_params(added.id, params)
        except BaseException:
            control_plane.discard_unstarted(self._control, added.id)
            raise
        return _served(added, zero_copy=data_path is DataPath.ZERO_COPY)


def wait_for_node(path: str) -> None:
    """Raises Failed when the node does not come up."""
    end = time.monotonic() + _NODE_LIMIT
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise Failed("the node was not made", subject=path, advice="is /dev a devtmpfs, and does udev run?")
        time.sleep(0.01)


def users(ublk_id: int) -> list[str]:
    """Who has the disk open, and what is stacked on it or mounted from it, in words."""
    return holding.disk_users(ublk_id)


def refuse_used(ublk_id: int) -> None:
    """Raises Busy naming the users of the disk."""
    if found := users(ublk_id):
        advice = "unmount it or end them first, or use --force"
        raise Busy(f"in use by {', '.join(found)}", subject=f"/dev/ublkb{ublk_id}", errno="EBUSY", advice=advice)


def write_back_and_stop(ublk_id: int, *, force: bool) -> None:
    """Removes the disk of a filtered device after writing back what the kernel has cached of it.

    Without `force` it raises Busy when the disk is in use, and Failed when writing back fails; the device goes on then.
    """
    try:
        helper.stop(ublk_id, force=force, timeout=_STOP_LIMIT)
    except OSError as error:
        if error.errno == errno.EBUSY:
            refuse_used(ublk_id)
        if error.errno != errno.ENODEV:
            raise from_os_error(error, subject=f"/dev/ublkb{ublk_id}") from None


def _mark_of(info: DeviceInfo) -> int:
    return (info.server_flags & _MARK) >> _MARK_SHIFT


def _served(info: DeviceInfo, *, zero_copy: bool) -> Served:
    return Served(
        ublk_id=info.id,
        queues=info.queues,
        depth=info.depth,
        desc_size=DESC_SIZE,
        flags=int(info.flags),
        zero_copy=zero_copy,
        mark=_mark_of(info),
    )
