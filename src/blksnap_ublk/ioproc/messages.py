# SPDX-License-Identifier: MIT
"""What the control process asks of the io process.

One message is one SOCK_SEQPACKET datagram of JSON; descriptors travel with it (SCM_RIGHTS) in the order
the docstring of the message names. The io process answers each message with exactly one `Done` or `Refused`.
It opens nothing but /dev/ublkcN itself. All sizes and offsets are bytes.

Names (`device`, `image`, `storage`) are chosen by the control process and stay the same over its restarts.
"""

from __future__ import annotations

import msgspec


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """First message of a connection; answered by `Inventory` in `Done.inventory`.

    Descriptors: none, or the doorbell, an eventfd that is rung when there is something to look at: an image that broke,
    a storage that is low, a write that waits for room.
    """

    version: int


class OpenDevice(msgspec.Struct, tag="open-device", frozen=True):
    """Make a filtered device. Descriptors: origin, active bitmap file, swallowed-trims file.

    `held`: the name under which the keeper holds the first of them; see Held.
    """

    device: str
    size: int
    block: int
    unit: int
    tracking_block: int
    held: str = ""


class ServeDevice(msgspec.Struct, tag="serve-device", frozen=True):
    """Open /dev/ublkcN and arm all queues; START_DEV (or END_USER_RECOVERY) is sent by the control process meanwhile.

    Descriptors: none, or a file in memory with BUFFERS_BYTES for each queue, zeroed, called `buffers`. It outlives the
    process, so writes go on as soon as old data is there, and do not wait for the difference storage; see Unstored.

    Answered when all queues are armed. After a refusal some tags may be armed: stop or delete the ublk device, then
    CloseDevice (which is EBUSY or ETIMEDOUT before that).
    """

    device: str
    ublk_id: int
    queues: int
    depth: int
    desc_size: int
    flags: int
    zero_copy: bool
    buffers: str = ""


class CloseDevice(msgspec.Struct, tag="close-device", frozen=True):
    """After STOP_DEV: let the queues end, close /dev/ublkcN and forget the device. Also undoes a half-made one.

    Refused with EBUSY while it has images, with ETIMEDOUT when the queues have not ended after 1 s: ask again.
    """

    device: str


class OpenStorage(msgspec.Struct, tag="open-storage", frozen=True):
    """Make a difference storage without areas. Descriptors: storage state file.

    With `adopt` that file, and the records files of the areas that follow, are what a former io process left. What it
    ever gave out counts as used until Sweep and EndQuarantine. Refused with EBADMSG when the file does not fit.
    """

    storage: str
    unit: int
    adopt: bool = False


class AddArea(msgspec.Struct, tag="add-area", frozen=True):
    """Append an area, at any time. Descriptors: the file or block device, the records file.

    `beneath`: the device on whose origin it lies, which is the first descriptor then; trims of that range which were
    swallowed are forgotten. The range is exempt in all images of that device that are taken while the area is used.
    `held`: the name under which the keeper holds the first descriptor; see Held.
    """

    storage: str
    offset: int
    length: int
    beneath: str | None = None
    held: str = ""


class SetStorage(msgspec.Struct, tag="set-storage", frozen=True):
    """How a storage behaves when it gets full; all are 0 for a new one.

    A write that finds no room waits `wait_ms` for it, then the snapshots that lack its units overflow; with 0 at once,
    also where one waits already. `low`: bytes; the doorbell is rung once, after this message or an AddArea, when less
    is free. `rate`: bytes a second that copies may fill it with, 0 for no limit.
    """

    storage: str
    wait_ms: int
    low: int
    rate: int


class BreakStorage(msgspec.Struct, tag="break-storage", frozen=True):
    """What it held is damaged: all its images are corrupted, `error` being the errno."""

    storage: str
    error: int


class CloseStorage(msgspec.Struct, tag="close-storage", frozen=True):
    """Forget a storage. Refused with EBUSY while an image uses it."""

    storage: str


class AddMapMemory(msgspec.Struct, tag="add-map-memory", frozen=True):
    """Add portions of map memory. Descriptors: one file for each portion (16 MiB, allocated and zeroed).

    The inventory tells which of them were added if it is refused. With `adopt` they hold maps that a former io process
    left: all of them have to be added, in the order in which they were first added, before any other. Nothing is given
    out of them before Sweep.
    """

    portions: list[str]
    adopt: bool = False


class OpenImage(msgspec.Struct, tag="open-image", frozen=True):
    """Make an image that is not taken yet. Descriptors: image state file.

    With `adopt` that file is what a former io process left, and the image, of `size` bytes, becomes the youngest of
    its device, which is not served yet: so oldest first. Its storage and the map memory were adopted before. Two more
    descriptors are the bitmaps before and after it, where writes to it are marked; an image that is about to be
    dropped needs none. Refused with EBADMSG when the file does not fit, with EBUSY when the device is served.
    """

    image: str
    device: str
    storage: str
    serial: int
    size: int = 0
    adopt: bool = False


class Exempt(msgspec.Struct, tag="exempt", frozen=True):
    """Before Take: ranges of (start, length), whole units, that the image shows as zeroes and never preserves.

    Refused with ENOMEM when map memory is used up: add some, send it again.
    """

    image: str
    ranges: list[tuple[int, int]]


class ServeImage(msgspec.Struct, tag="serve-image", frozen=True):
    """Like ServeDevice, for an image that has been taken, of a device that is served. One queue.

    After a refusal nothing of it is left here, but delete the ublk device.
    """

    image: str
    ublk_id: int
    depth: int
    desc_size: int
    flags: int
    zero_copy: bool


class EndImage(msgspec.Struct, tag="end-image", frozen=True):
    """Before STOP_DEV of an image that is in use: its requests end with EIO within about a second, those that wait for
    storage too. It is corrupted from then on (ECANCELED), if it was not before.
    """

    image: str


class FinishImage(msgspec.Struct, tag="finish-image", frozen=True):
    """After STOP_DEV of the image's ublk device: let its queue end and close /dev/ublkcN. The image itself stays."""

    image: str


class Member(msgspec.Struct, frozen=True):
    """One device of a take, with its image and (as the next descriptor) the file of its next active bitmap."""

    device: str
    image: str


class Take(msgspec.Struct, tag="take", frozen=True):
    """One instant for all members: gates closed, drained, switched, opened.

    Descriptors: the next bitmap of each member, then the commit file. Members stacked on one another come top first.
    `Done.gate_us` is how long the first gate was closed, `Done.gate_writes_us` how much of that until the last write in
    flight had ended. Refused with `Refused.member` and errno ETIMEDOUT when a device was not drained in time, EBUSY
    when writes of it wait for room in a storage; nothing is switched then. The commit file (4096 bytes) gets its first
    32-bit word set to 1 while the gates are still closed.
    """

    members: list[Member]
    limit_ms: int


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """Take an image out of its device (after FinishImage) and forget it; also undoes OpenImage.

    What older images of its storage need of it is handed to them. Trims that were swallowed are sent, after the answer,
    when it was the last image of its device. Nothing waits for the writes of the device where a younger image of the
    storage is active. Refused with ETIMEDOUT when writes of the device or reads of the image do
    not end, or there is much to hand over: ask again, it goes on where it was.
    """

    image: str


class Unstored(msgspec.Struct, tag="unstored", frozen=True):
    """Before Sweep, may be sent again. Descriptors: buffers of ServeDevice that former io processes had, some of them.

    What is in there and perhaps not in its storage yet is stored when the sweep begins.
    """

    buffers: list[str]


class Sweep(msgspec.Struct, tag="sweep", frozen=True):
    """All that a former io process left has been adopted: what of it is not stored yet is, then its maps are checked
    against their records, in slices; then map memory that none of them uses is free.

    A storage that does not answer, or refuses to store that, has its images corrupted.

    An image whose map does not fit is corrupted (EBADMSG). `lost`: the serials of images that could not be adopted.
    `Inventory.swept` tells when it has ended; until then no adopted image is served or dropped (EBUSY).
    """

    lost: list[int]


class EndQuarantine(msgspec.Struct, tag="end-quarantine", frozen=True):
    """The storage I/O of former io processes has ended: places that no map holds are free, after the sweep."""


class ResizeDevice(msgspec.Struct, tag="resize-device", frozen=True):
    """The origin has grown to `size` bytes. Descriptors: the active bitmap and the swallowed-trims file for that size,
    zeroed; they get what the former ones hold. Images keep their size. It may be sent again. Refused with ETIMEDOUT
    when writes do not come to rest within 2 s, with EINVAL for a device that would shrink.
    """

    device: str
    size: int


class Held(msgspec.Struct, tag="held", frozen=True):
    """For a keeper that has lost them: the descriptors that `held` of OpenDevice and AddArea named.

    Answered with at most 200 of them, from the one with the number `first` on, and their names in `Done.held`.
    """

    first: int


class Mark(msgspec.Struct, tag="mark", frozen=True):
    """Force ranges of (start, length) into the next increment."""

    device: str
    ranges: list[tuple[int, int]]


class Status(msgspec.Struct, tag="status", frozen=True):
    """Answered by `Done.inventory`."""


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """End the process. Queues that still serve a device are left to recovery."""


Message = (
    Hello
    | OpenDevice
    | ServeDevice
    | CloseDevice
    | OpenStorage
    | AddArea
    | SetStorage
    | BreakStorage
    | CloseStorage
    | AddMapMemory
    | OpenImage
    | Exempt
    | ServeImage
    | EndImage
    | FinishImage
    | Take
    | Drop
    | Unstored
    | Sweep
    | EndQuarantine
    | ResizeDevice
    | Held
    | Mark
    | Status
    | Shutdown
)


class DeviceReport(msgspec.Struct, frozen=True):
    """A device as the io process has it. `serving`: its queues are armed. Counters are requests, `copied` bytes.

    They count from when the device was served. `buffers`: see ServeDevice.
    """

    device: str
    ublk_id: int | None
    serving: bool
    reads: int = 0
    writes: int = 0
    discards: int = 0
    copies: int = 0
    copied: int = 0
    waits: int = 0
    parked: int = 0
    buffers: str = ""


class ImageReport(msgspec.Struct, frozen=True):
    """An image as the io process has it. `status`: active, overflown, corrupted; `error`: errno, 0 while active.

    `preserved`: bytes kept for it; `written`: bytes written to the image itself.
    """

    image: str
    ublk_id: int | None
    serving: bool
    taken: bool
    status: str
    error: int
    preserved: int
    written: int = 0


class StorageReport(msgspec.Struct, frozen=True):
    """A storage as the io process has it; `areas`: bytes used in each."""

    storage: str
    used: int
    capacity: int
    areas: list[int]


class Inventory(msgspec.Struct, frozen=True):
    """All that the io process holds. `pid`: what START_DEV wants.

    `lifeboat`: its forerunners died again and again. `swept`: nothing that was adopted waits for the end of a sweep.
    """

    version: int
    pid: int
    devices: list[DeviceReport]
    images: list[ImageReport]
    storages: list[StorageReport]
    map_memory: int
    map_memory_free: int
    portions: list[str]
    lifeboat: bool = False
    swept: bool = True


class Done(msgspec.Struct, tag="done", frozen=True):
    """The message was carried out."""

    inventory: Inventory | None = None
    gate_us: int = 0
    gate_writes_us: int = 0
    held: list[str] = []


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Nothing was changed. `errno` positive; `text` one line; `member`: the device of a Take that was late."""

    errno: int
    text: str
    member: str | None = None


Answer = Done | Refused

VERSION = 5
