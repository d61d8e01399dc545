# SPDX-License-Identifier: MIT
"""Images: opened, served, finished, forgotten. How they get into the set of their device is in `instants`."""

import errno
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from blksnap_ublk.engine import Adopted, Image, ImageStatus, UblkQueue, UblkStatus
from blksnap_ublk.ioproc.devices import (
    FINISH_LIMIT,
    OPEN_LIMIT,
    Devices,
    FilteredDevice,
    backend_info,
    bitmap_bytes,
    expect,
)
from blksnap_ublk.ioproc.image_threads import ImageThread, ImageThreads
from blksnap_ublk.ioproc.messages import (
    BreakStorage,
    EndImage,
    Exempt,
    FinishImage,
    ImageReport,
    OpenImage,
    ResizeDevice,
    ServeDevice,
    ServeImage,
)
from blksnap_ublk.ioproc.state_map import StateMap
from blksnap_ublk.ioproc.storages import DifferenceStorage, MapMemory, Storages
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.ublk.negotiation import DataPath
from blksnap_ublk.ublk.serving import Backend, finish_queues, open_char, start_queues

log = logging.getLogger(__name__)

MAX_ERRNO = 4095


@dataclass
class HeldImage:
    """An image. `taken`: it is, or was, in its device's set; `dropped`: it is out of it, about to be forgotten.

    `bitmaps`: of the intervals before and after it, where writes to it are marked. `unswept`: it was adopted, and its
    map is not checked yet.
    """

    name: str
    device: FilteredDevice
    storage: DifferenceStorage
    image: Image
    state: StateMap
    taken: bool = False
    dropped: bool = False
    ublk_id: int | None = None
    char: int = -1
    thread: ImageThread | None = None
    queues: list[UblkQueue] = field(default_factory=list)
    bitmaps: list[StateMap] = field(default_factory=list)
    reported: ImageStatus = ImageStatus.ACTIVE
    unswept: bool = False

    @property
    def serving(self) -> bool:
        """Whether its queue is armed."""
        return bool(self.queues) and all(queue.status is UblkStatus.ARMED for queue in self.queues)


def refuse_unswept(image: HeldImage) -> None:
    """Raises OSError(EBUSY)."""
    if image.unswept:
        raise OSError(errno.EBUSY, f"image {image.name!r} was adopted and is not checked yet")


class Images:
    """All images, by name."""

    def __init__(self, devices: Devices, storages: Storages, map_memory: MapMemory, threads: ImageThreads) -> None:
        self._devices = devices
        self._storages = storages
        self._map_memory = map_memory
        self._threads = threads
        self._images: dict[str, HeldImage] = {}

    def find(self, name: str) -> HeldImage:
        """Raises OSError(ENOENT)."""
        try:
            return self._images[name]
        except KeyError:
            raise OSError(errno.ENOENT, f"there is no image {name!r}") from None

    def all(self) -> Sequence[HeldImage]:
        """In the order in which they were opened."""
        return list(self._images.values())

    def open(self, message: OpenImage, descriptors: Descriptors) -> None:
        """Raises OSError; EEXIST for a name that is taken, EINVAL for a storage of another unit or a wrong serial.

        Of an image to adopt: EBADMSG when its state does not fit, EBUSY when its device is served.
        """
        if not message.adopt:
            expect(descriptors, 1, message)
        if message.image in self._images:
            raise OSError(errno.EEXIST, f"there is an image {message.image!r} already")
        device = self._devices.find(message.device)
        storage = self._storages.find(message.storage)
        size = message.size if message.adopt else device.size
        with ExitStack() as undo:
            state = StateMap(descriptors[0], Image.state_bytes(size, device.unit), "image state")
            undo.callback(state.close)
            bitmaps = [] if not message.adopt else self._bitmaps(message, device, descriptors, undo)
            both = (bitmaps[0].memory, bitmaps[1].memory) if bitmaps else None
            try:
                image = Image(
                    device.device,
                    storage.storage,
                    self._map_memory.arena,
                    state.memory,
                    serial=message.serial,
                    adopt=Adopted(size, both) if message.adopt else None,
                )
            except OSError as error:
                if error.errno == errno.EBADMSG:
                    self._break_older(device, storage)
                raise
            undo.pop_all()
        opened = HeldImage(message.image, device, storage, image, state, bitmaps=bitmaps, unswept=message.adopt)
        self._images[message.image] = opened
        device.images.add(message.image)
        storage.images.add(message.image)
        if message.adopt:
            opened.taken = True
            device.taken.add(message.image)

    def _break_older(self, device: FilteredDevice, storage: DifferenceStorage) -> None:
        """They may read through the map of one that does not fit."""
        for name in device.images & storage.images:
            self._images[name].image.break_(ImageStatus.CORRUPTED, errno.EBADMSG)

    @staticmethod
    def _bitmaps(
        message: OpenImage, device: FilteredDevice, descriptors: Descriptors, undo: ExitStack
    ) -> list[StateMap]:
        """Those before and after an image to adopt, which may be as small as the device was then."""
        if message.size <= 0 or message.size > device.size:
            raise OSError(errno.EINVAL, f"an image of {message.size} bytes of a device of {device.size}")
        if len(descriptors) not in (1, 3):
            raise OSError(errno.EINVAL, f"OpenImage came with {len(descriptors)} descriptors, not 1 or 3")
        least = bitmap_bytes(message.size, device.tracking_block)
        found = []
        for index in range(1, len(descriptors)):
            found.append(StateMap(descriptors[index], least, "bitmap of an image"))
            undo.callback(found[-1].close)
        return found

    def resize_device(self, message: ResizeDevice, descriptors: Descriptors) -> None:
        """Raises OSError. Images keep their size, but some mark in the active bitmap, which is replaced."""
        device = self._devices.find(message.device)
        images = [image for image in self._images.values() if image.device is device]
        self._devices.resize(message, descriptors, [image.image for image in images])
        for image in images:
            image.bitmaps.append(device.bitmap.hold())

    def unswept(self) -> list[HeldImage]:
        """Those that were adopted and wait for the end of a sweep."""
        return [image for image in self._images.values() if image.unswept]

    def exempt(self, message: Exempt) -> None:
        """Raises OSError; EINVAL for what is no range of whole units, or an image that is taken; ENOMEM."""
        image = self.find(message.image)
        if image.taken:
            raise OSError(errno.EINVAL, f"image {image.name!r} was taken already")
        for start, length in message.ranges:
            if start < 0 or length <= 0 or start + length > image.device.size:
                raise OSError(errno.EINVAL, f"{start}+{length} lies outside of the device")
            image.image.exempt(start, length)

    def break_storage(self, message: BreakStorage) -> None:
        """Raises OSError; EINVAL for what is no errno."""
        if not 1 <= message.error <= MAX_ERRNO:
            raise OSError(errno.EINVAL, f"{message.error} is no errno")
        for name in self._storages.find(message.storage).images:
            self._images[name].image.break_(ImageStatus.CORRUPTED, message.error)

    def serve(self, message: ServeImage) -> None:
        """Returns when the queue is armed. Raises OSError; EINVAL before the image is taken or its device served."""
        image = self.find(message.image)
        if image.char >= 0:
            raise OSError(errno.EBUSY, f"image {image.name!r} is served already, or was and is not finished")
        if not image.taken or image.dropped:
            raise OSError(errno.EINVAL, f"image {image.name!r} is not taken")
        refuse_unswept(image)
        if image.device.char < 0:
            raise OSError(
                errno.EINVAL, f"device {image.device.name!r} is not served, so it has no barrier for its images"
            )
        as_device = ServeDevice(
            device=image.name,
            ublk_id=message.ublk_id,
            queues=1,
            depth=message.depth,
            desc_size=message.desc_size,
            flags=message.flags,
            zero_copy=message.zero_copy,
        )
        info = backend_info(as_device, 1)
        path = DataPath.ZERO_COPY if message.zero_copy else DataPath.COPY
        with ExitStack() as undo:
            char = open_char(message.ublk_id, timeout=OPEN_LIMIT)
            undo.callback(os.close, char)
            thread = self._threads.take(message.depth, image.device.name, image.device.char)
            undo.callback(self._threads.give, thread, image.device.name)
            # If this fails no queue is left; should single tags be, the thread stays until they have come back.
            queues = start_queues([thread.thread], char, info, path, Backend(image=image.image))
            undo.pop_all()
        image.ublk_id, image.char, image.thread, image.queues = message.ublk_id, char, thread, queues

    def end(self, message: EndImage) -> None:
        """Raises OSError(ENOENT)."""
        self.find(message.image).image.break_(ImageStatus.CORRUPTED, errno.ECANCELED)

    def finish(self, message: FinishImage) -> None:
        """Raises OSError; ETIMEDOUT while its ublk device is not stopped: call it again then."""
        image = self.find(message.image)
        finish_queues(image.queues, timeout=FINISH_LIMIT)
        if image.thread is not None:
            self._threads.give(image.thread, image.device.name)
            image.thread = None
        if image.char >= 0:
            os.close(image.char)
            image.char = -1
        image.ublk_id = None

    def forget(self, image: HeldImage, seconds: float) -> None:
        """For an image that is not served and not in its device's set. Raises OSError.

        ETIMEDOUT while it is used, or has more than can be given back in that time: call it again, it goes on.
        """
        image.image.release(timeout_ms=int(seconds * 1000))
        image.image.close()
        while image.bitmaps:
            image.bitmaps.pop().close()
        del self._images[image.name]
        image.device.images.discard(image.name)
        image.storage.images.discard(image.name)
        image.state.close()

    def reports(self) -> list[ImageReport]:
        """All images, for the inventory."""
        return [self._report(image) for image in self._images.values()]

    def log_broken(self) -> None:
        """Log each image that was broken since the last time."""
        for image in self._images.values():
            status, error = image.image.status
            if status is not image.reported:
                image.reported = status
                if status in (ImageStatus.OVERFLOWN, ImageStatus.CORRUPTED):
                    log.error("image %s is %s: %s", image.name, status.name.lower(), os.strerror(error))

    @staticmethod
    def _report(image: HeldImage) -> ImageReport:
        status, error = image.image.status
        return ImageReport(
            image=image.name,
            ublk_id=image.ublk_id,
            serving=image.serving,
            taken=image.taken and not image.dropped,
            status=status.name.lower(),
            error=error,
            preserved=image.image.preserved,
            written=image.image.written,
        )
