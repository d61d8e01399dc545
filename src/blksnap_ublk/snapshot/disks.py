# SPDX-License-Identifier: MIT
"""The ublk devices of filtered devices and images: added, started, stopped, deleted; the io process serves them."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from blksnap_ublk.errors import Busy, Failed, from_os_error
from blksnap_ublk.host.blockdev import BlockDevice
from blksnap_ublk.snapshot.catalogue import Catalogue, Phase, Served
from blksnap_ublk.snapshot.links import Links
from blksnap_ublk.snapshot.role import Role
from blksnap_ublk.ublk import control_plane, helper, holding, partitions
from blksnap_ublk.ublk.control import Control
from blksnap_ublk.ublk.device_info import DESC_SIZE, DeviceInfo, DeviceState
from blksnap_ublk.ublk.features import Features
from blksnap_ublk.ublk.limits import needs_copy, params_of_block_device
from blksnap_ublk.ublk.negotiation import DataPath, Wish, settle

# `server_flags` of every ublk device of ours: this tag, its mark, a checksum of the runtime directory.
_TAG_SHIFT = 56
_TAG = 0xB5 << _TAG_SHIFT
_MARK_SHIFT, _MARK_BITS = 24, 32
_MARK = (1 << _MARK_BITS) - 1 << _MARK_SHIFT
IMAGE_DEPTH = 64
_NODE_LIMIT = 10.0  # seconds for udev or devtmpfs to make a node
_RECOVERY_LIMIT = 60.0  # seconds for the queues of another io process to be taken into use
_STOP_LIMIT = 60.0  # seconds for the requests in flight
_PARTITIONS_LIMIT = 10.0  # seconds for the partition table to be read
_log = logging.getLogger(__name__)


class Disks:
    """Adds, starts, stops and deletes the ublk devices of one daemon.

    `links` must be told of a device (`links.filtered`, `links.image`) before it is started; what follows from that is
    done here.
    """

    def __init__(self, control: Control, runtime: Path) -> None:
        """`runtime` is the runtime directory: devices of a daemon with another one are left alone."""
        self._control = control
        self._tag = _TAG | zlib.crc32(bytes(runtime.absolute())) >> 8
        self._without_partitions: set[int] = set()
        self._stopping: dict[int, Control] = {}
        self.links = Links(runtime)

    def add_filtered(self, key: str, origin: BlockDevice, queues: int, depth: int) -> Served:
        """Adds the ublk device of the filtered device of that key, which it is marked with: see `filtered`.

        Raises OSError, and leaves nothing then.
        """
        return self._add(origin, queues, depth, discards=True, mark=int(key, 16))

    def add_image(self, origin: BlockDevice, *, partitions: bool = False) -> Served:
        """Adds the ublk device of an image of `origin`: writable, one queue; the kernel shows its `partitions` or not.

        Raises OSError, and leaves nothing then.
        """
        served = self._add(origin, 1, IMAGE_DEPTH, discards=False, mark=secrets.randbits(_MARK_BITS))
        if not partitions:
            self._without_partitions.add(served.ublk_id)
        return served

    def start(self, ublk_id: int, pid: int, given_up: helper.GivenUp) -> None:
        """Makes the disk of a device whose queues process `pid` has armed; its nodes and links are there then.

        Nobody waits for its partitions any more once `given_up()` says that the process has gone.
        Raises OSError, Failed.
        """
        control_plane.start_device(self._control, ublk_id, pid)
        wait_for_node(f"/dev/ublkb{ublk_id}")
        try:
            self._show_partitions(ublk_id, given_up)
        except OSError as error:
            _log.warning("/dev/ublkb%d: its partitions: %s", ublk_id, error)
        self.links.appear(ublk_id)

    def stop(self, ublk_id: int) -> None:
        """Removes the disk, in use or not, without writing back: for images, which go with it, and to undo a start.

        Its users get errors. Nothing happens where there is none. Raises OSError; TimeoutError while requests of the
        disk are under way: call it again, it goes on.
        """
        try:
            if ublk_id in self._stopping:
                self._wait_for_stop(ublk_id)
                return
            # It may wait for a storage that is silent: the commands of other devices go by another way.
            own = Control()
            try:
                own.stop(ublk_id, timeout=_STOP_LIMIT)
            except TimeoutError:
                self._stopping[ublk_id] = own
                raise
            except BaseException:
                own.close()
                raise
            own.close()
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def delete(self, ublk_id: int, *, in_use: bool = False) -> None:
        """Forgets a ublk device that is stopped and closed; nothing happens where there is none. Raises OSError.

        With `in_use` it does not wait for those who still have the disk open: the device goes when they close it.
        """
        # While the id is still ours: another device may get it next.
        self.links.remove(ublk_id)
        if (stopping := self._stopping.pop(ublk_id, None)) is not None:
            stopping.close()
        self._without_partitions.discard(ublk_id)
        if in_use:
            control_plane.discard_unstarted(self._control, ublk_id)
        else:
            control_plane.delete_device(self._control, ublk_id)

    def resize(self, ublk_id: int, size: int) -> None:
        """Gives a disk another size in bytes. Raises OSError."""
        self._control.update_size(ublk_id, size)

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

    def foreign(self) -> list[DeviceInfo]:
        """Those of daemons with other runtime directories. Raises OSError."""
        found = [info for info in self._control.devices() if info.server_flags >> _TAG_SHIFT == _TAG >> _TAG_SHIFT]
        return [info for info in found if not self._is_ours(info)]

    def filtered(self, keys: Iterable[str]) -> dict[str, int]:
        """The ids of the filtered devices of these keys that have a disk. Raises OSError.

        Where a server has died a moment ago the kernel may not know that yet.
        """
        states = (DeviceState.LIVE, DeviceState.QUIESCED)
        waiting = {_mark_of(info): info.id for info in self.ours() if info.state in states}
        return {key: waiting[int(key, 16)] for key in keys if int(key, 16) in waiting}

    def sweep_links(self, catalogue: Catalogue) -> None:
        """Makes the role files and links agree with the catalogue: after a death of the daemon. Raises OSError."""
        # What exists is looked up before what is known: what an attach makes meanwhile is known by then.
        there = self.links.known()
        devices, snapshots = catalogue.devices(), catalogue.snapshots()
        names = {device.key: device.name for device in devices}
        known = _disk_names(catalogue) | {f"{d.number[0]}:{d.number[1]}" for d in devices}
        wanted: dict[str, Role] = {}
        for device in devices:
            if device.phase is Phase.ACTIVE and device.served is not None and self.state_of(device.served) is not None:
                wanted[f"ublkb{device.served.ublk_id}"] = Role.of_filtered(device.name, device.origin)
                wanted[f"{device.number[0]}:{device.number[1]}"] = Role.of_origin(device.name, device.origin)
        for snapshot in snapshots:
            for image in snapshot.images if snapshot.phase is Phase.ACTIVE else ():
                if image.served is not None and image.device in names and self.state_of(image.served) is not None:
                    role = Role.of_image(snapshot.id, names[image.device], image.origin)
                    wanted[f"ublkb{image.served.ublk_id}"] = role
        self.links.sweep(there - known, wanted)

    def _wait_for_stop(self, ublk_id: int) -> None:
        """For a command that was not done in time, and goes on: another one would only wait as well."""
        end = time.monotonic() + _STOP_LIMIT
        try:
            while self._control.info(ublk_id).state is not DeviceState.DEAD:
                if time.monotonic() > end:
                    raise TimeoutError(errno.ETIMEDOUT, f"/dev/ublkb{ublk_id}: its requests have not ended")
                time.sleep(0.05)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
        self._stopping.pop(ublk_id).close()

    def _show_partitions(self, ublk_id: int, given_up: helper.GivenUp) -> None:
        """Where the kernel looks for partitions by itself it has done so by now."""
        wanted = ublk_id not in self._without_partitions
        self._without_partitions.discard(ublk_id)
        asked = Features.NO_AUTO_PART_SCAN in self._control.info(ublk_id).flags
        if wanted and asked:
            helper.look_for_partitions(ublk_id, timeout=_PARTITIONS_LIMIT, given_up=given_up)
        elif not wanted and not asked and partitions.shown(ublk_id):
            helper.hide_partitions(ublk_id, timeout=_PARTITIONS_LIMIT, given_up=given_up)

    def _is_ours(self, info: DeviceInfo) -> bool:
        return info.server_flags & ~_MARK == self._tag

    def _add(self, origin: BlockDevice, queues: int, depth: int, *, discards: bool, mark: int) -> Served:
        # The kernel's own look for partitions comes some time after the start: it is asked to look when that is over.
        wish = Wish(part_scan=False)
        flags = self._tag | mark << _MARK_SHIFT
        added = control_plane.create_device(self._control, wish, queues=queues, depth=depth, server_flags=flags)
        try:
            data_path = settle(wish, added.flags, target_needs_copy=needs_copy(origin.limits))
            params = params_of_block_device(origin.limits, origin.size, data_path=data_path, max_io=added.max_io_bytes)
            self._control.set_params(added.id, params if discards else replace(params, discard=None))
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


def write_back_and_stop(ublk_id: int, *, force: bool, given_up: helper.GivenUp) -> None:
    """Removes the disk of a filtered device after writing back what the kernel has cached of it.

    Without `force` it raises Busy when the disk is in use, and Failed when writing back fails; the device goes on then.
    """
    try:
        helper.stop(ublk_id, force=force, timeout=_STOP_LIMIT, given_up=given_up)
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


def _disk_names(catalogue: Catalogue) -> set[str]:
    """The names of the disks of all ublk devices in the catalogue."""
    found = [device.served for device in catalogue.devices()]
    found += [image.served for snapshot in catalogue.snapshots() for image in snapshot.images]
    return {f"ublkb{served.ublk_id}" for served in found if served is not None}
