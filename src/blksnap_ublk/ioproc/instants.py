# SPDX-License-Identifier: MIT
"""Changes of the sets of images: taking at one instant, dropping, and what follows when nobody waits any more."""

import errno
import logging
import time
from contextlib import ExitStack

from blksnap_ublk.engine import Closing, Late, NoRoom, replay_swallowed, switch_all, wait_for_room
from blksnap_ublk.ioproc.devices import SETTLE_LIMIT, Devices, FilteredDevice, bitmap_bytes, expect
from blksnap_ublk.ioproc.images import HeldImage, Images, refuse_unswept
from blksnap_ublk.ioproc.messages import Drop, Take
from blksnap_ublk.ioproc.state_map import StateMap
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.rpc.loop import Loop

log = logging.getLogger(__name__)

COMMIT_BYTES = 4096
DROP_LIMIT_MS = 2000
ROOM_LIMIT_MS = 100  # what makes room may come by the next message
DROP_SETTLE_LIMIT = 0.5
NAP = 0.02
REPLAY_SLICE = 64 << 20
REPLAY_LIMIT_MS = 1000
REPLAY_PAUSE = 0.5


class LateMember(OSError):
    """A device whose writes did not end in time, or, with EBUSY, wait for room; nothing was switched."""

    def __init__(self, device: str, number: int, why: str) -> None:
        super().__init__(number, f"writes of device {device!r} {why}")
        self.member = device


class Instants:
    """Takes and drops images. What can wait is done from the loop, between messages."""

    def __init__(self, loop: Loop, devices: Devices, images: Images) -> None:
        self._loop = loop
        self._devices = devices
        self._images = images
        self._settling = False

    def take(self, message: Take, descriptors: Descriptors) -> Closing:
        """One instant for all members; for how long the first gate was closed.

        Raises OSError; LateMember when writes did not end in time. Nothing is switched then.
        """
        expect(descriptors, len(message.members) + 1, message)
        images = [self._images.find(member.image) for member in message.members]
        self._check_members(message, images)
        devices = [image.device for image in images]
        with ExitStack() as undo:
            bitmaps = []
            for index, device in enumerate(devices):
                least = bitmap_bytes(device.size, device.tracking_block)
                bitmaps.append(StateMap(descriptors[index], least, "next active bitmap"))
                undo.callback(bitmaps[-1].close)
            commit = StateMap(descriptors[len(devices)], COMMIT_BYTES, "commit file")
            undo.callback(commit.close)
            for device, image in zip(devices, images, strict=True):
                device.settle(SETTLE_LIMIT)
                device.device.prepare_take(image.image)
                undo.callback(device.device.cancel)
            closing = self._switch(devices, [bitmap.memory for bitmap in bitmaps], message.limit_ms, commit.memory)
            undo.pop_all()
        commit.close()
        for device, image, bitmap in zip(devices, images, bitmaps, strict=True):
            image.taken = True
            device.taken.add(image.name)
            image.bitmaps = [device.bitmap.hold(), bitmap.hold()]
            device.old_maps.append(device.bitmap)
            device.bitmap = bitmap
            self._settle_later(device)
        return closing

    def drop(self, message: Drop) -> None:
        """Raises OSError; EBUSY while the image is served.

        ETIMEDOUT: writes of the device, or reads of the image, did not end in time, or, EBUSY, wait for room. Call it
        again: it goes on.
        """
        image = self._images.find(message.image)
        if image.char >= 0:
            raise OSError(errno.EBUSY, f"image {image.name!r} is served; it must be finished first")
        device = image.device
        refuse_unswept(image)
        if image.taken and not image.dropped:
            self._leave_device(image)
            image.dropped = True
            device.taken.discard(image.name)
            self._settle_later(device)
        if image.dropped:
            device.settle(DROP_SETTLE_LIMIT)
        self._images.forget(image, DROP_SETTLE_LIMIT)
        if image.dropped and not device.taken and not device.replaying:
            device.replaying = True
            self._loop.later(0, lambda: self._replay(device))

    def _leave_device(self, image: HeldImage) -> None:
        device = image.device
        device.settle(SETTLE_LIMIT)
        device.device.prepare_drop(image.image)
        try:
            if device.device.begin_drop():
                self._switch([device], [None], DROP_LIMIT_MS, None)
            else:
                device.device.drop_now()
        except BaseException:
            device.device.cancel()
            raise

    @staticmethod
    def _check_members(message: Take, images: list[HeldImage]) -> None:
        names = [member.device for member in message.members]
        if not names or len(set(names)) < len(names):
            raise OSError(errno.EINVAL, "a take needs members, each of another device")
        for member, image in zip(message.members, images, strict=True):
            if image.device.name != member.device:
                raise OSError(errno.EINVAL, f"image {image.name!r} is one of device {image.device.name!r}")
            if image.taken:
                raise OSError(errno.EINVAL, f"image {image.name!r} was taken already")

    @staticmethod
    def _switch(devices: list[FilteredDevice], bitmaps: list[object], limit_ms: int, commit: object) -> Closing:
        members = [device.device for device in devices]
        try:
            wait_for_room(members, limit_ms=ROOM_LIMIT_MS)
            return switch_all(members, bitmaps, limit_ms=limit_ms, commit=commit)
        except NoRoom as error:
            why = "wait for room in the difference storage"
            raise LateMember(devices[error.index].name, errno.EBUSY, why) from None
        except Late as error:
            device = devices[error.index]
            if device.device.waits_for_room:
                raise LateMember(device.name, errno.EBUSY, "wait for room in the difference storage") from None
            raise LateMember(device.name, errno.ETIMEDOUT, f"did not end within {limit_ms} ms") from None

    # ---- afterwards ----

    def _settle_later(self, device: FilteredDevice) -> None:
        device.unsettled = True
        if not self._settling:
            self._settling = True
            self._loop.later(NAP, self._settle)

    def _settle(self) -> None:
        self._settling = False
        for device in self._devices.all():
            try:
                device.settle(0)
            except TimeoutError:
                self._settle_later(device)

    def _replay(self, device: FilteredDevice) -> None:
        """Send one slice of swallowed trims; what is left when an image is taken waits for its end."""
        device.replaying = False
        if device.taken or not device.serving or device not in self._devices.all():
            return
        began = time.monotonic()
        try:
            more = replay_swallowed(
                device.threads[0],
                device.device,
                device.origin.file,
                slice_bytes=REPLAY_SLICE,
                limit_ms=REPLAY_LIMIT_MS,
            )
        except TimeoutError:
            more = True
        except OSError as error:
            log.warning("device %s: swallowed trims cannot be sent: %s", device.name, error)
            return
        if more:
            device.replaying = True
            # As long a pause as the gate was closed: writers get their turn.
            self._loop.later(min(REPLAY_PAUSE, time.monotonic() - began), lambda: self._replay(device))
