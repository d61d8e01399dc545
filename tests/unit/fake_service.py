# SPDX-License-Identifier: MIT
"""A Service that keeps its devices and snapshots in dictionaries: the commands, without what they stand for."""

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from blksnap_ublk import forms
from blksnap_ublk.calls import EventBatch
from blksnap_ublk.daemon.service import ChangesAnswer
from blksnap_ublk.errors import Busy, NotFound, Unsupported, Untrusted, UsageError
from blksnap_ublk.snapshot import overflow

SIZE = 1 << 30
GONE = 4_000_000
"""A pid of no process."""
CREATED = forms.timestamp(1_769_860_800)
LOST = forms.timestamp(1_769_864_400)


class FakeService:
    """Implements Service. Tests set its fields: what is mounted, what is open, which ranges changed."""

    def __init__(self) -> None:
        self.devices: dict[str, forms.Device] = {}
        self.snapshots: dict[str, forms.Snapshot] = {}
        self.mounted: dict[str, str] = {}
        self.open_images: set[str] = set()
        self.warnings: list[str] = []
        self.ranges: NDArray[np.int64] = np.array([[0, 65536], [1 << 20, 131072]], dtype=np.int64)
        self.last: NDArray[np.uint32] = np.arange(SIZE // 65536, dtype=np.uint32) % 7
        self.marked: list[forms.Range] = []
        self.requests: list[tuple[str, object]] = []
        self.trusted: list[bool] = []
        self.backlog: list[forms.Event] = []
        self.grown = asyncio.Event()
        self.followers = 0
        self.stopped = False

    async def attach(
        self,
        device: str,
        *,
        name: str | None,
        queues: int | None,
        depth: int | None,
        tracking_block: int | None,
        unit: int | None,
        trust_offline: bool,
    ) -> forms.Attached:
        if device == "/dev/gone":
            raise NotFound("no such block device", subject=device, errno="ENOENT")
        if device == "/dev/zoned":
            raise Unsupported("zoned devices cannot be filtered", subject=device)
        self.trusted.append(trust_offline)
        if device == "/dev/bug":
            raise ZeroDivisionError("a bug")
        if device in self.mounted:
            raise Busy(
                f"in use by mount {self.mounted[device]}", subject=device, errno="EBUSY", advice="unmount it first"
            )
        number = len(self.devices)
        attached = forms.Device(
            device=f"/dev/ublkb{number}",
            name=name or os.path.basename(device),
            origin=device,
            id=number,
            size=SIZE,
            state=forms.DeviceState.LIVE,
            data_path=forms.DataPath.ZERO_COPY,
            queues=queues or 2,
            depth=depth or 128,
            generation=str(uuid.UUID(int=number)),
            change_number=0,
            tracking_block=tracking_block or 65536,
            unit=unit or 4096,
            snapshots=[],
            link=f"/dev/blksnap/{name or os.path.basename(device)}",
        )
        self.devices[attached.device] = attached
        self.tell("attached", device=attached.device)
        return forms.Attached(device=attached, warnings=self.warnings)

    async def detach(self, device: str, *, force: bool) -> forms.Detached:
        found = self.find(device)
        if found.snapshots and not force:
            raise Busy(f"in snapshot {found.snapshots[0]}", subject=device, errno="EBUSY", advice="destroy it first")
        del self.devices[found.device]
        warnings = [f"snapshot {broken} is broken" for broken in found.snapshots]
        return forms.Detached(device=found, broken_snapshots=found.snapshots, warnings=warnings)

    async def resize(self, device: str) -> forms.Resized:
        found = self.find(device)
        larger = msgspec.structs.replace(found, size=max(found.size, 2 * SIZE))
        self.devices[found.device] = larger
        return forms.Resized(device=larger, former_size=found.size)

    async def list_devices(self) -> list[forms.Device]:
        return list(self.devices.values())

    async def create_snapshot(
        self,
        devices: Sequence[str],
        *,
        storage: Sequence[str],
        storage_files: Sequence[str],
        limit: int | None,
        on_overflow: str | None,
        freeze: forms.Freeze,
        partitions: bool,
        ttl: float | None,
        while_pid: int | None,
        wipe: bool,
        copy_rate: int | None,
    ) -> forms.SnapshotCreated:
        self.requests.append(("create_snapshot", (list(storage), list(storage_files), limit, on_overflow, freeze)))
        self.requests.append(("lifetime", (partitions, ttl, while_pid)))
        if while_pid == GONE:
            raise UsageError("no such process", subject=f"--while-pid {while_pid}")
        if on_overflow is not None:
            overflow.parse(on_overflow)
        members = [self.find(device) for device in devices]
        identity = str(uuid.UUID(int=0xABCD << 112 | len(self.snapshots)))
        images = []
        for index, member in enumerate(members):
            number = member.change_number + 1
            self.devices[member.device] = msgspec.structs.replace(
                member, change_number=number, snapshots=[*member.snapshots, identity]
            )
            images.append(
                forms.Image(
                    image=f"/dev/ublkb{100 + index}",
                    device=member.device,
                    origin=member.origin,
                    size=SIZE,
                    generation=member.generation,
                    change_number=number,
                    cursor=f"{member.generation}:{number}",
                    state=forms.SnapshotState.ACTIVE,
                    preserved_bytes=4096,
                    link=f"/dev/blksnap/{identity}/{member.name}",
                )
            )
        areas = [forms.Area(path=path, start=0, count=2048, used=4096) for path in (*storage, *storage_files)]
        snapshot = forms.Snapshot(
            id=identity,
            created=CREATED,
            state=forms.SnapshotState.ACTIVE,
            error=None,
            frozen=freeze is not forms.Freeze.NO,
            gate_us=412,
            images=images,
            storage=forms.Storage(
                used=4096 * len(areas),
                capacity=(1 << 20) * len(areas),
                limit=limit,
                on_overflow=on_overflow or "break",
                areas=areas,
                forecast_seconds=90.5,
                snapshots=[identity],
                wipe=wipe,
                copy_rate=copy_rate,
                growing=limit is not None,
            ),
            expires=None if ttl is None else forms.timestamp(1_769_860_800 + ttl),
            ttl=ttl,
            while_pid=while_pid,
            partitions=partitions,
        )
        self.snapshots[identity] = snapshot
        self.tell("taken", snapshot=identity)
        return forms.SnapshotCreated(snapshot=snapshot, warnings=self.warnings)

    async def list_snapshots(self) -> list[forms.Snapshot]:
        return list(self.snapshots.values())

    async def show_snapshot(self, snapshot: str) -> forms.Snapshot:
        return self.find_snapshot(snapshot)

    async def check_snapshot(self, snapshot: str) -> forms.SnapshotCheck:
        found = self.find_snapshot(snapshot)
        return forms.SnapshotCheck(id=found.id, trusted=found.state is forms.SnapshotState.ACTIVE, reason=found.error)

    async def renew_snapshot(self, snapshot: str, *, ttl: float | None) -> forms.Snapshot:
        found = self.find_snapshot(snapshot)
        lasts = found.ttl if ttl is None else ttl
        if lasts is None:
            raise UsageError("has no time to live", subject=f"snapshot {found.id}", advice="give --ttl TIME")
        renewed = msgspec.structs.replace(found, ttl=lasts, expires=forms.timestamp(1_769_860_900 + lasts))
        self.snapshots[found.id] = renewed
        return renewed

    async def destroy_snapshots(self, snapshots: Sequence[str], *, force: bool) -> forms.Destroyed:
        found = [self.find_snapshot(snapshot) for snapshot in snapshots]
        for snapshot in found:
            if snapshot.id in self.open_images and not force:
                raise Busy("open by cat (pid 77)", subject=snapshot.images[0].image, errno="EBUSY")
        for snapshot in found:
            del self.snapshots[snapshot.id]
            for image in snapshot.images:
                member = self.devices[image.device]
                left = [identity for identity in member.snapshots if identity != snapshot.id]
                self.devices[image.device] = msgspec.structs.replace(member, snapshots=left)
        return forms.Destroyed(destroyed=[snapshot.id for snapshot in found], warnings=[])

    async def show_storage(self, snapshot: str) -> forms.Storage:
        return self.find_snapshot(snapshot).storage

    async def add_storage(
        self, snapshot: str, *, storage: Sequence[str], storage_files: Sequence[str]
    ) -> forms.Storage:
        known = self.find_snapshot(snapshot).storage
        areas = [forms.Area(path=path, start=0, count=2048, used=0) for path in (*storage, *storage_files)]
        return self.change_storage(
            snapshot, areas=[*known.areas, *areas], capacity=known.capacity + (1 << 20) * len(areas)
        )

    async def limit_storage(self, snapshot: str, limit: int) -> forms.Storage:
        return self.change_storage(snapshot, limit=limit)

    async def throttle_storage(self, snapshot: str, copy_rate: int | None) -> forms.Storage:
        if copy_rate is not None and copy_rate < 1 << 20:
            raise UsageError(f"{copy_rate} bytes a second is no rate for copies", subject="--copy-rate")
        return self.change_storage(snapshot, copy_rate=copy_rate)

    async def show_changes(self, device: str, *, since: str | None, until: str | None) -> ChangesAnswer:
        found = self.find(device)
        if until is not None and self.find_snapshot(until).state is not forms.SnapshotState.ACTIVE:
            raise Untrusted(f"snapshot {until} is broken: {self.find_snapshot(until).error}")
        foreign = since is not None and not since.startswith(found.generation)
        ranges = np.array([[0, SIZE]], dtype=np.int64) if foreign else self.ranges
        form = forms.Changes(
            device=found.device,
            since=since,
            until=f"{found.generation}:{found.change_number}",
            tracking_block=found.tracking_block,
            all=foreign,
            reason="new-generation" if foreign else None,
            changed_bytes=int(ranges[:, 1].sum()),
            ranges=[],
        )
        return ChangesAnswer(form=form, ranges=ranges)

    async def describe_changes(self, device: str) -> forms.ChangesInfo:
        found = self.find(device)
        return forms.ChangesInfo(
            device=found.device,
            generation=found.generation,
            change_number=found.change_number,
            tracking_block=found.tracking_block,
            blocks=SIZE // found.tracking_block,
            changed_blocks=3,
        )

    async def last_change(self, device: str) -> NDArray[np.uint32]:
        self.find(device)
        return self.last

    async def mark_changes(self, device: str, ranges: Sequence[forms.Range]) -> forms.Marked:
        found = self.find(device)
        if any(r.start < 0 or r.length <= 0 or r.start + r.length > found.size for r in ranges):
            raise UsageError("a range lies outside of the device", subject=device)
        self.marked += ranges
        return forms.Marked(device=found.device, marked_bytes=sum(r.length for r in ranges))

    async def doctor(self) -> list[forms.Finding]:
        ok, fail = forms.FindingState.OK, forms.FindingState.FAIL
        return [
            forms.Finding(name="kernel", state=ok, text="6.12", advice=None),
            forms.Finding(name="ublk", state=fail, text="no /dev/ublk-control", advice="modprobe ublk_drv"),
        ]

    async def repair(self) -> forms.Repaired:
        return forms.Repaired(fixed=["udev: wrote /etc/rules"], findings=await self.doctor())

    async def status(self) -> forms.Status:
        traffic = forms.Traffic(reads=1, writes=2, read_bytes=4096, written_bytes=8192, preserved_bytes=0)
        return forms.Status(
            time=CREATED,
            pid=os.getpid(),
            version="9.9",
            devices=[forms.DeviceStatus(device=d, traffic=traffic, rates=None) for d in self.devices.values()],
            snapshots=list(self.snapshots.values()),
        )

    async def events(
        self, since: int | None, *, follow: bool, snapshot: str | None
    ) -> AsyncGenerator[EventBatch, None]:
        seen = since if since is not None else len(self.backlog) if follow else 0
        self.followers += follow
        try:
            yield EventBatch(events=[], seq=seen)
            while True:
                grown = self.grown
                for event in self.backlog[seen:]:
                    seen = event.seq
                    if snapshot is None or event.snapshot == snapshot:
                        yield EventBatch(events=[event], seq=seen)
                if not follow:
                    return
                await grown.wait()
        finally:
            self.followers -= follow

    async def version(self) -> str:
        return "9.9"

    async def stop(self) -> None:
        self.stopped = True

    def tell(self, kind: str, *, snapshot: str | None = None, device: str | None = None) -> None:
        """Add an event. In the loop's thread only."""
        self.backlog.append(
            forms.Event(
                seq=len(self.backlog) + 1, time=CREATED, type=kind, snapshot=snapshot, device=device, data={"n": 1}
            )
        )
        self.grown.set()
        self.grown = asyncio.Event()

    def break_snapshot(self, identity: str, state: forms.SnapshotState, error: str) -> None:
        """Mark a snapshot."""
        found = self.snapshots[identity]
        self.snapshots[identity] = msgspec.structs.replace(found, state=state, error=error, lost_at=LOST)

    def change_storage(self, reference: str, **changes: object) -> forms.Storage:
        """The storage of a snapshot with other fields."""
        found = self.find_snapshot(reference)
        storage = msgspec.structs.replace(found.storage, **changes)
        self.snapshots[found.id] = msgspec.structs.replace(found, storage=storage)
        return storage

    def find(self, device: str) -> forms.Device:
        for found in self.devices.values():
            if device in (found.device, found.origin, found.name):
                return found
        raise NotFound("no such device", subject=device)

    def find_snapshot(self, reference: str) -> forms.Snapshot:
        found = [s for s in self.snapshots.values() if s.id.startswith(reference)]
        if len(reference) < 4:
            raise UsageError("give at least 4 characters of a snapshot's UUID", subject=reference)
        if len(found) != 1:
            raise NotFound("no such snapshot" if not found else "more than one snapshot", subject=reference)
        return found[0]
