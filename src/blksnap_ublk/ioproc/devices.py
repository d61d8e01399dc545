# SPDX-License-Identifier: MIT
"""Filtered devices: opened, served, marked, closed."""

import errno
import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from blksnap_ublk.engine import BUFFERS_BYTES, Counters, Device, Image, Thread, UblkQueue, UblkStatus, settle
from blksnap_ublk.ioproc.messages import CloseDevice, DeviceReport, Mark, OpenDevice, ResizeDevice, ServeDevice
from blksnap_ublk.ioproc.shared_files import SharedFile, SharedFiles
from blksnap_ublk.ioproc.state_map import StateMap, check_allocated
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.ublk.device_info import DESC_SIZE, MAX_IO_BYTES, DeviceInfo
from blksnap_ublk.ublk.features import Features
from blksnap_ublk.ublk.negotiation import DataPath
from blksnap_ublk.ublk.serving import Backend, UnfinishedQueues, finish_queues, open_char, start_queues

log = logging.getLogger(__name__)

PAGE = 4096
OPEN_LIMIT = 5.0
FINISH_LIMIT = 1.0  # other messages wait meanwhile; whoever asks does so again
HALF_ARMED_LIMIT = 0.2
SETTLE_LIMIT = 5.0
MARK_LIMIT = 2.0
RESIZE_LIMIT_MS = 2000


def bitmap_bytes(size: int, tracking_block: int) -> int:
    """Bytes of a bitmap with a bit for each tracking block, in whole pages."""
    return -(-size // (tracking_block * 8 * PAGE)) * PAGE


def expect(descriptors: Descriptors, count: int, message: object) -> None:
    """Raises OSError(EINVAL) unless a message came with `count` descriptors."""
    if len(descriptors) != count:
        text = f"{type(message).__name__} came with {len(descriptors)} descriptors, not {count}"
        raise OSError(errno.EINVAL, text)


def backend_info(message: ServeDevice, queues: int) -> DeviceInfo:
    """What starting queues needs to know of a ublk device. Raises OSError(EINVAL)."""
    if message.desc_size != DESC_SIZE:
        raise OSError(errno.EINVAL, f"request descriptors of {message.desc_size} bytes, not {DESC_SIZE}")
    try:
        return DeviceInfo(message.ublk_id, queues, message.depth, MAX_IO_BYTES, Features(message.flags))
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from None


@dataclass
class FilteredDevice:
    """A filtered device. `images` are those opened on it, `taken` those of them that are in its set of images.

    `old_maps` are bitmaps that a switch replaced, until it is settled.
    """

    name: str
    unit: int
    tracking_block: int
    origin: SharedFile
    device: Device
    bitmap: StateMap
    swallowed: StateMap
    ublk_id: int | None = None
    char: int = -1
    buffers: str = ""
    threads: list[Thread] = field(default_factory=list)
    queues: list[UblkQueue] = field(default_factory=list)
    images: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)
    unsettled: bool = False
    replaying: bool = False
    old_maps: list[StateMap] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.device.size

    @property
    def serving(self) -> bool:
        """Whether all its queues are armed."""
        return bool(self.queues) and all(queue.status is UblkStatus.ARMED for queue in self.queues)

    def end_serving(self, seconds: float) -> None:
        """After its ublk device was stopped: end queues and threads, close /dev/ublkcN.

        Raises OSError(ETIMEDOUT) when requests or I/O are still out; it can be called again.
        """
        finish_queues(self.queues, timeout=seconds)
        while self.threads:
            self.threads[-1].stop(timeout_ms=int(seconds * 1000))
            self.threads.pop()
        if self.char >= 0:
            os.close(self.char)
            self.char = -1
        self.ublk_id = None
        self.buffers = ""

    def settle(self, seconds: float) -> None:
        """Wait until nobody uses what the last switch replaced. Raises OSError(ETIMEDOUT)."""
        if self.unsettled:
            settle(self.device, timeout_ms=int(seconds * 1000))
            self.unsettled = False
            while self.old_maps:
                self.old_maps.pop().close()


class Devices:
    """All filtered devices, by name."""

    def __init__(self, files: SharedFiles, *, lock_fd: int, io_flusher: bool) -> None:
        self._files = files
        self._lock_fd = lock_fd
        self._io_flusher = io_flusher
        self._devices: dict[str, FilteredDevice] = {}

    def find(self, name: str) -> FilteredDevice:
        """Raises OSError(ENOENT)."""
        try:
            return self._devices[name]
        except KeyError:
            raise OSError(errno.ENOENT, f"there is no device {name!r}") from None

    def all(self) -> Sequence[FilteredDevice]:
        """In the order in which they were opened."""
        return list(self._devices.values())

    def open(self, message: OpenDevice, descriptors: Descriptors) -> None:
        """Raises OSError; EEXIST for a name that is taken, EINVAL for sizes that do not fit."""
        expect(descriptors, 3, message)
        if message.device in self._devices:
            raise OSError(errno.EEXIST, f"there is a device {message.device!r} already")
        if message.size <= 0 or message.tracking_block <= 0:
            raise OSError(errno.EINVAL, f"size {message.size}, tracking block {message.tracking_block}")
        with ExitStack() as undo:
            origin = self._files.get(descriptors[0], storage=False, held=message.held)
            undo.callback(self._files.put, origin)
            room = origin.file.info.size
            if room < message.size:
                raise OSError(errno.EINVAL, f"the origin has {room} bytes, {message.size} are needed")
            least = bitmap_bytes(message.size, message.tracking_block)
            bitmap = StateMap(descriptors[1], least, "active bitmap")
            undo.callback(bitmap.close)
            swallowed = StateMap(descriptors[2], least, "swallowed trims")
            undo.callback(swallowed.close)
            device = Device(
                size=message.size,
                block=message.block,
                unit=message.unit,
                tracking_block=message.tracking_block,
                origin=origin.file,
                bitmap=bitmap.memory,
                swallowed=swallowed.memory,
            )
            undo.pop_all()
        self._devices[message.device] = FilteredDevice(
            message.device, message.unit, message.tracking_block, origin, device, bitmap, swallowed
        )

    def serve(self, message: ServeDevice, descriptors: Descriptors) -> None:
        """Returns when all queues are armed.

        Raises OSError. When some tags were armed and others could not be, the former come back only when the ublk
        device is stopped or deleted: `close` the device after that.
        """
        device = self.find(message.device)
        if device.queues or device.char >= 0:
            raise OSError(errno.EBUSY, f"device {device.name!r} is served already, or was and is not closed")
        info = backend_info(message, message.queues)
        path = DataPath.ZERO_COPY if message.zero_copy else DataPath.COPY
        if descriptors or message.buffers:
            expect(descriptors, 1, message)
            check_allocated(descriptors[0], message.queues * BUFFERS_BYTES, "buffers")
        with ExitStack() as undo:
            char = open_char(message.ublk_id, timeout=OPEN_LIMIT)
            undo.callback(os.close, char)
            threads: list[Thread] = []
            for number in range(message.queues):
                # Each queue puts the device's barrier in the ring of its thread by itself.
                thread = Thread(
                    slots=message.depth,
                    lock_fd=self._lock_fd,
                    io_flusher=self._io_flusher,
                    buffers=(descriptors[0], number * BUFFERS_BYTES) if descriptors else None,
                )
                undo.callback(thread.stop)
                threads.append(thread)
            try:
                queues = start_queues(threads, char, info, path, Backend(device=device.device))
            except UnfinishedQueues as error:
                undo.pop_all()
                device.char, device.threads, device.queues = char, threads, error.queues
                device.buffers = message.buffers
                if not error.queues:
                    with suppress(TimeoutError):
                        device.end_serving(HALF_ARMED_LIMIT)
                raise
            undo.pop_all()
        device.ublk_id, device.char, device.threads, device.queues = message.ublk_id, char, threads, queues
        device.buffers = message.buffers

    def close(self, message: CloseDevice) -> None:
        """Raises OSError; EBUSY while it has images. ETIMEDOUT while its ublk device is not stopped: call it again."""
        device = self.find(message.device)
        if device.images:
            raise OSError(errno.EBUSY, f"device {device.name!r} has the images {', '.join(sorted(device.images))}")
        device.settle(SETTLE_LIMIT)
        device.end_serving(FINISH_LIMIT)
        device.device.close()
        del self._devices[device.name]
        device.bitmap.close()
        device.swallowed.close()
        self._files.put(device.origin)

    def resize(self, message: ResizeDevice, descriptors: Descriptors, images: Sequence[Image]) -> None:
        """`images`: those of the device. Raises OSError; EINVAL for a smaller size, or one beyond the origin."""
        expect(descriptors, 2, message)
        device = self.find(message.device)
        if not device.size <= message.size <= device.origin.file.info.size:
            room = device.origin.file.info.size
            text = f"{message.size} bytes are not between the {device.size} of the device and the {room} of its origin"
            raise OSError(errno.EINVAL, text)
        device.settle(SETTLE_LIMIT)
        least = bitmap_bytes(message.size, device.tracking_block)
        with ExitStack() as undo:
            bitmap = StateMap(descriptors[0], least, "active bitmap")
            undo.callback(bitmap.close)
            swallowed = StateMap(descriptors[1], least, "swallowed trims")
            undo.callback(swallowed.close)
            device.device.resize(message.size, bitmap.memory, swallowed.memory, images, limit_ms=RESIZE_LIMIT_MS)
            undo.pop_all()
        device.old_maps += [device.bitmap, device.swallowed]
        device.bitmap, device.swallowed = bitmap, swallowed
        device.unsettled = True
        with suppress(TimeoutError):  # before the next change of its images, then
            device.settle(SETTLE_LIMIT)

    def mark(self, message: Mark) -> None:
        """Raises OSError; EINVAL for a range outside of the device, before anything is marked."""
        device = self.find(message.device)
        for start, length in message.ranges:
            if start < 0 or length <= 0 or start + length > device.size:
                raise OSError(errno.EINVAL, f"{start}+{length} is not within the {device.size} bytes of the device")
        deadline = time.monotonic() + MARK_LIMIT
        for start, length in message.ranges:
            while True:
                try:
                    device.device.mark(start, length)
                    break
                except OSError as error:
                    if error.errno != errno.EAGAIN or time.monotonic() > deadline:
                        raise
                    time.sleep(0.001)

    def reports(self) -> list[DeviceReport]:
        """All devices, for the inventory."""
        return [self._report(device) for device in self._devices.values()]

    @staticmethod
    def _report(device: FilteredDevice) -> DeviceReport:
        total = sum((queue.counters for queue in device.queues), Counters())
        return DeviceReport(
            device=device.name,
            ublk_id=device.ublk_id,
            serving=device.serving,
            reads=total.reads,
            writes=total.writes,
            discards=total.discards,
            copies=total.copies,
            copied=total.copied,
            waits=total.waits,
            parked=total.parked,
            buffers=device.buffers,
        )
