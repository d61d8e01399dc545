# SPDX-License-Identifier: MIT
"""From SPECs to areas: everything is opened and checked before anything is created, extended or changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType

from blksnap_ublk.errors import Busy, Failed, UsageError, from_os_error
from blksnap_ublk.host import filesystem
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.spec import SECTOR, Spec, check_disjoint
from blksnap_ublk.snapshot.storage import devices, files
from blksnap_ublk.snapshot.storage.areas import AreaKind, Identity, OpenArea, OpenAreas, Planned, UsedRange
from blksnap_ublk.snapshot.storage.beneath import Seat
from blksnap_ublk.snapshot.storage.descriptors import DescriptorRegistry
from blksnap_ublk.snapshot.storage.growth import Growable, plan_sizes
from blksnap_ublk.snapshot.storage.reservation import Reservation
from blksnap_ublk.snapshot.storage.target import Target


def open_storage(
    specs: Sequence[Spec],
    *,
    registry: DescriptorRegistry,
    off_limits: Collection[DeviceNumber],
    used: Collection[UsedRange] = (),
    limit: int | None = None,
    needed: int,
    unit: int = 4096,
    seats: Mapping[str, Seat] = MappingProxyType({}),
    given_up: Callable[[], bool] = lambda: False,
    announce: Callable[[Sequence[Planned]], None] = lambda planned: None,
) -> OpenAreas:
    """Opens the areas of all SPECs, in their order, with space of their own and locked against others.

    `off_limits` are the origins in use or about to be, the filtered devices and the images; `used` is what other
    difference storages hold. `limit` is the user's `--limit`; without one, directories give what is `needed` (the size
    of the members) at most. All sizes in bytes. Allocation can take long and may wait for file systems.

    `seats`: the paths of SPECs that lie directly on a filtered device: helper processes reserve them whole, so they
    need a limit where they are no files yet, and what they are asked for first. Nothing is waited for there any more
    once `given_up()` says that these devices are not served.

    `announce` is told of the files with names when all is opened, locked and checked, and before anything is changed;
    what it raises is passed on.

    Raises UsageError, Busy, Unsupported, NotFound or Failed and then leaves nothing behind.
    """
    closing, undoing = ExitStack(), ExitStack()
    try:
        check_disjoint(specs)
        targets = [
            _open_seated(spec, seats[spec.path], registry, closing, given_up)
            if spec.path in seats
            else _open(spec, registry, closing, off_limits, unit)
            for spec in specs
        ]
        sizes = _sizes(targets, limit, needed, unit)
        sized = list(zip(targets, sizes, strict=True))
        found = [[] if target.reservation else _areas(target, size, unit) for target, size in sized]
        _refuse_overlaps([area for areas in found for area in areas], used)
        through = [target for target in targets if target.kind is not AreaKind.DEVICE and not target.reservation]
        for target in through:
            files.refuse_unusable_blocks(target)
        announce([_planned(target, size) for target, size in sized if target.kind is AreaKind.FILE])
        notes = []
        for areas, (target, size) in zip(found, sized, strict=True):
            if target.reservation:
                reserved, said = _reserve(target, target.reservation, size, unit, undoing)
                areas += reserved
                notes += said
            else:
                notes += _prepare(target, size, undoing)
        for target in through:
            if target.publish:
                files.publish(target, undoing)
        every = tuple(_with_state(area) for areas in found for area in areas)
        reservations = [target.reservation for target in targets if target.reservation]
        return OpenAreas(every, tuple(dict.fromkeys(notes)), closing, undoing, reservations)
    except BaseException:
        try:
            undoing.close()
        finally:
            closing.close()
        raise


def _open(
    spec: Spec, registry: DescriptorRegistry, closing: ExitStack, off_limits: Collection[DeviceNumber], unit: int
) -> Target:
    if not os.path.isabs(spec.path):
        raise UsageError("is not an absolute path", subject=spec.path, advice="write it from the root on")
    try:
        mode = os.stat(spec.path).st_mode
    except FileNotFoundError:
        return _open_missing(spec, registry, closing, off_limits)
    except OSError as error:
        raise from_os_error(error, subject=spec.path) from None
    if stat.S_ISBLK(mode):
        return devices.open_device(spec, registry, closing, off_limits, unit)
    if stat.S_ISREG(mode):
        return files.open_existing(spec, registry, closing, off_limits)
    if not stat.S_ISDIR(mode):
        raise UsageError("neither a regular file nor a directory nor a block device", subject=spec.path)
    if spec.ranges is not None:
        raise UsageError("a directory has no sector ranges", subject=spec.path, advice="name the directory alone")
    return files.open_unnamed(spec, spec.path, registry, closing, off_limits)


def _open_seated(
    spec: Spec, seat: Seat, registry: DescriptorRegistry, closing: ExitStack, given_up: Callable[[], bool]
) -> Target:
    """By a helper: nothing of its file system is touched here."""
    reservation = Reservation(spec, seat, given_up)
    closing.callback(reservation.close)
    descriptor, found = reservation.open()
    registry.acquire(found.identity, lambda: descriptor)
    closing.callback(registry.release, found.identity)
    return Target(
        spec=spec,
        kind=found.kind,
        descriptor=descriptor,
        identity=found.identity,
        size=found.size,
        alignment=seat.unit,
        memory_alignment=seat.unit,
        direct=True,
        filesystem=found.filesystem,
        device=seat.filesystem,
        publish=found.publish,
        reservation=reservation,
        room=found.room,
    )


def _open_missing(
    spec: Spec, registry: DescriptorRegistry, closing: ExitStack, off_limits: Collection[DeviceNumber]
) -> Target:
    directory = os.path.dirname(spec.path)
    if spec.ranges is not None or os.path.lexists(spec.path) or not os.path.isdir(directory):
        raise UsageError("no such file, directory or block device", subject=spec.path, errno="ENOENT")
    return files.open_unnamed(spec, directory, registry, closing, off_limits)


def _sizes(targets: Sequence[Target], limit: int | None, needed: int, unit: int) -> list[int]:
    """The size of each target once it is allocated."""
    growables = [_growable(target) for target in targets if target.grows]
    if limit is None:
        for target in targets:
            if target.publish and not target.reservation:
                text = "no such file, directory or block device"
                raise UsageError(text, subject=target.spec.path, advice="--limit SIZE would create a file of that size")
    fixed = sum(length for t in targets if not t.grows for _, length in t.byte_ranges(t.size))
    whole: dict[Identity, int] = {}
    left = None if limit is None else limit - fixed - sum(growable.size for growable in growables)
    for target in targets:
        if target.reservation and target.spec.ranges is None:
            whole[target.identity] = _whole_size(target, left, unit)
            fixed += whole[target.identity] - target.size
            left = None if left is None else left - (whole[target.identity] - target.size)
    planned = iter(plan_sizes(growables, fixed=fixed, limit=limit, needed=needed, unit=unit))
    return [next(planned) if t.grows else whole.get(t.identity, t.size) for t in targets]


def _whole_size(target: Target, left: int | None, unit: int) -> int:
    """The size at which a file on a filtered device is reserved; `left`: bytes by which all may grow together."""
    path = target.spec.path
    if left is None:
        if target.publish or target.kind is AreaKind.UNNAMED:
            text = "lies on a filtered device, where storage is reserved whole before a snapshot is taken"
            raise UsageError(text, subject=path, advice="give --limit SIZE, how much to reserve")
        left = 0
    wanted = max(left, 0) // unit * unit
    if target.size + wanted < unit:
        raise UsageError("nothing can be reserved: it is empty, and no limit is left for it", subject=path)
    if wanted > target.room:
        text = f"its file system has no room for {wanted} bytes, {wanted - target.room} are missing"
        raise Failed(text, subject=path, errno="ENOSPC", advice="give a smaller --limit or more storage")
    return target.size + wanted


def _planned(target: Target, size: int) -> Planned:
    former = -1 if target.publish else target.size
    beneath = target.reservation.seat.device if target.reservation else None
    return Planned(target.spec.path, target.identity, former, max(size, target.size), beneath)


def _former_size(target: Target) -> int | None:
    return _planned(target, 0).former_size if target.kind is AreaKind.FILE else None


def _growable(target: Target) -> Growable:
    return Growable(
        path=target.spec.path,
        size=target.size,
        is_directory=target.kind is AreaKind.UNNAMED,
        filesystem=target.identity.device,
        room=filesystem.room(target.descriptor),
        room_with_reserve=filesystem.room_with_reserve(target.descriptor),
    )


def _areas(target: Target, size: int, unit: int) -> list[OpenArea]:
    found = []
    for start, length in target.byte_ranges(size):
        first = -(-start // target.alignment) * target.alignment
        last = (start + length) // target.alignment * target.alignment
        if last - first < unit:
            text = f"the area {start // SECTOR}+{length // SECTOR} has no room for one unit of {unit} bytes"
            if target.alignment > SECTOR:
                text += f" at a multiple of {target.alignment}"
            raise UsageError(text, subject=target.spec.path)
        found.append(
            OpenArea(
                path=target.spec.path,
                fd=target.descriptor,
                start_byte=first,
                length=last - first,
                kind=target.kind,
                alignment=target.alignment,
                memory_alignment=target.memory_alignment,
                direct=target.direct,
                written=target.kind is AreaKind.DEVICE,
                filesystem=target.filesystem,
                device=target.device,
                identity=target.identity,
                former_size=_former_size(target),
            )
        )
    return found


def _refuse_overlaps(areas: Sequence[OpenArea], used: Collection[UsedRange]) -> None:
    ordered = sorted(areas, key=lambda area: area.used_range)
    for before, area in zip([None, *ordered], ordered, strict=False):
        if before is not None and before.used_range.overlaps(area.used_range):
            text = f"sectors {_sectors(area)} overlap {_sectors(before)} of {before.path}"
            raise UsageError(text, subject=area.path, advice="name each sector once")
    for area in areas:
        for other in used:
            if other.overlaps(area.used_range):
                text = f"sectors {other.start // SECTOR}+{other.length // SECTOR} hold the storage of another snapshot"
                raise Busy(text, subject=area.path, errno="EBUSY", advice="name other sectors, or destroy it first")


def _sectors(area: OpenArea) -> str:
    return f"{area.start_byte // SECTOR}+{area.length // SECTOR}"


def _reserve(
    target: Target, reservation: Reservation, size: int, unit: int, undoing: ExitStack
) -> tuple[list[OpenArea], list[str]]:
    undoing.callback(reservation.undo)
    target.byte_ranges(size)
    pieces, notes = reservation.reserve(size, unit)
    areas = [
        OpenArea(
            path=target.spec.path,
            fd=target.descriptor,
            start_byte=piece.offset,
            length=piece.length,
            kind=target.kind,
            alignment=target.alignment,
            memory_alignment=target.memory_alignment,
            direct=True,
            written=True,
            filesystem=target.filesystem,
            device=target.device,
            identity=target.identity,
            beneath=reservation.seat.device,
            physical=piece.physical,
            former_size=_former_size(target),
        )
        for piece in pieces
    ]
    return areas, notes


def _prepare(target: Target, size: int, undoing: ExitStack) -> list[str]:
    if target.kind is AreaKind.DEVICE:
        return []
    files.allocate(target, size, undoing)
    notes = []
    if target.kind is AreaKind.FILE and not target.publish:
        notes.append(files.make_private(target, undoing))
    if not target.direct:
        notes.append(f"{target.spec.path}: {target.filesystem} has no direct I/O here: goes through the page cache")
    return [note for note in notes if note is not None]


def _with_state(area: OpenArea) -> OpenArea:
    if area.kind is AreaKind.DEVICE or area.beneath is not None:
        return area
    return replace(area, written=files.is_written(area.fd, area.start_byte, area.length))
