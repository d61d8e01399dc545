# SPDX-License-Identifier: MIT
"""What the daemon does for its callers: the `Service`, on the operations of `snapshot/`, each in a thread."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk import forms
from blksnap_ublk.calls import EventBatch
from blksnap_ublk.daemon import left_over
from blksnap_ublk.daemon.events import EventLog
from blksnap_ublk.daemon.forecast import Forecasts
from blksnap_ublk.daemon.service import ChangesAnswer
from blksnap_ublk.errors import BlksnapError, Failed, NotFound, UsageError, errno_symbol, from_os_error
from blksnap_ublk.host import doctor, repair, sysfs
from blksnap_ublk.ioproc.client import IoRefused
from blksnap_ublk.snapshot import (
    attach,
    broken,
    change_queries,
    create,
    destroy,
    detach,
    enlarging,
    lifetime,
    naming,
    report,
    resize,
    storages,
    throttle,
)
from blksnap_ublk.snapshot.catalogue import DeviceEntry, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.spec import parse_specs
from blksnap_ublk.ublk.control import granted_features
from blksnap_ublk.version import installed_version

THREADS = 64
JOIN = "@"
"""What a SPEC begins with that names a snapshot, to share its storage."""
_SECTOR = 512
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Commands:
    """The service. Questions about what is there never wait for an operation that runs."""

    def __init__(
        self, context: Context, events: EventLog, forecasts: Forecasts, runtime: Path, stop: Callable[[], None]
    ) -> None:
        """`runtime` is the runtime directory; `stop` begins the end of the daemon."""
        self._context = context
        self._events = events
        self._forecasts = forecasts
        self._runtime = runtime
        self._stop = stop
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="command")

    def close(self) -> None:
        """Returns when all operations have ended."""
        self._threads.shutdown()

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
        options = attach.AttachOptions(name, queues, depth, tracking_block, unit, trust_offline)
        entry, warnings = await self._in_thread(attach.attach, self._context, device, options)
        _log.info("attached %s as %s", entry.origin, naming.block_path(entry))
        return forms.Attached(device=report.device_form(self._context, entry), warnings=warnings)

    async def detach(self, device: str, *, force: bool) -> forms.Detached:
        entry = self._device(device)
        form = report.device_form(self._context, entry)

        def run() -> tuple[list[str], list[str]]:
            return detach.detach(self._context, entry, force=force)

        broken, warnings = await self._in_thread(run)
        _log.info("detached %s", form.origin)
        return forms.Detached(device=form, broken_snapshots=broken, warnings=warnings)

    async def resize(self, device: str) -> forms.Resized:
        entry, former_size = await self._in_thread(resize.resize, self._context, self._device(device))
        if entry.size > former_size:
            _log.info("resized %s from %d to %d bytes", naming.block_path(entry), former_size, entry.size)
        return forms.Resized(device=report.device_form(self._context, entry), former_size=former_size)

    async def list_devices(self) -> list[forms.Device]:
        return [report.device_form(self._context, entry) for entry in naming.served_devices(self._context.catalogue)]

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
        members = [self._device(device) for device in devices]
        options = create.CreateOptions(
            specs=parse_specs([spec for spec in storage if not spec.startswith(JOIN)], storage_files),
            limit=limit,
            on_overflow=on_overflow,
            freeze=freeze,
            partitions=partitions,
            ttl=ttl,
            while_pid=while_pid,
            wipe=wipe,
            copy_rate=copy_rate,
            join=self._joined(storage),
        )
        entry, warnings = await self._in_thread(create.create, self._context, members, options)
        await self._in_thread(left_over.note_pinned_files, self._context)
        form = self._snapshot_form(entry)
        _log.info("took snapshot %s of %s, gate closed for %d us", form.id, ", ".join(devices), form.gate_us)
        return forms.SnapshotCreated(snapshot=form, warnings=warnings)

    async def list_snapshots(self) -> list[forms.Snapshot]:
        return [self._snapshot_form(entry) for entry in naming.held_snapshots(self._context.catalogue)]

    async def show_snapshot(self, snapshot: str) -> forms.Snapshot:
        return self._snapshot_form(self._snapshot(snapshot))

    async def check_snapshot(self, snapshot: str) -> forms.SnapshotCheck:
        entry = self._snapshot(snapshot)
        state, error = report.condition(self._context, entry)
        reason = None if error is None else f"{state.value}: {error}"
        return forms.SnapshotCheck(id=entry.id, trusted=reason is None, reason=reason)

    async def renew_snapshot(self, snapshot: str, *, ttl: float | None) -> forms.Snapshot:
        entry = self._snapshot(snapshot)
        renewed = await self._in_thread(lifetime.renew, self._context, entry, ttl)
        return self._snapshot_form(renewed)

    async def destroy_snapshots(self, snapshots: Sequence[str], *, force: bool) -> forms.Destroyed:
        found = [self._snapshot(snapshot) for snapshot in snapshots]
        entries = list({entry.id: entry for entry in found}.values())
        destroyed: list[str] = []
        warnings: list[str] = []

        def run(entry: SnapshotEntry) -> list[str]:
            return destroy.destroy(self._context, entry, force=force)

        for entry in entries:
            try:
                warnings += await self._in_thread(run, entry)
            except BlksnapError as error:
                if not destroyed:
                    raise
                gone = f"destroyed before: {', '.join(destroyed)}"
                raise type(error)(f"snapshot {entry.id}: {error.message}; {gone}") from error
            destroyed.append(entry.id)
        await self._in_thread(left_over.note_pinned_files, self._context)
        return forms.Destroyed(destroyed=destroyed, warnings=warnings)

    async def show_storage(self, snapshot: str) -> forms.Storage:
        return self._storage_form(storages.of(self._context, self._snapshot(snapshot)))

    async def add_storage(
        self, snapshot: str, *, storage: Sequence[str], storage_files: Sequence[str]
    ) -> forms.Storage:
        entry = self._snapshot(snapshot)
        specs = parse_specs(storage, storage_files)
        enlarged = await self._in_thread(enlarging.add, self._context, entry, specs)
        await self._in_thread(left_over.note_pinned_files, self._context)
        return self._storage_form(enlarged)

    async def limit_storage(self, snapshot: str, limit: int) -> forms.Storage:
        entry = self._snapshot(snapshot)
        return self._storage_form(await self._in_thread(enlarging.set_limit, self._context, entry, limit))

    async def throttle_storage(self, snapshot: str, copy_rate: int | None) -> forms.Storage:
        entry = self._snapshot(snapshot)
        return self._storage_form(await self._in_thread(throttle.set_copy_rate, self._context, entry, copy_rate))

    async def show_changes(self, device: str, *, since: str | None, until: str | None) -> ChangesAnswer:
        entry = self._device(device)
        found = await self._in_thread(change_queries.show, self._context, entry, since, until)
        form = forms.Changes(
            device=naming.block_path(entry),
            since=None if found.since is None else str(found.since),
            until=str(found.until),
            tracking_block=found.tracking_block,
            all=found.all,
            reason=found.reason,
            changed_bytes=found.changed_bytes,
            ranges=[],
        )
        return ChangesAnswer(form, found.ranges)

    async def describe_changes(self, device: str) -> forms.ChangesInfo:
        return await self._in_thread(change_queries.describe, self._context, self._device(device))

    async def last_change(self, device: str) -> NDArray[np.uint32]:
        return await self._in_thread(change_queries.last_change, self._context, self._device(device))

    async def mark_changes(self, device: str, ranges: Sequence[forms.Range]) -> forms.Marked:
        entry = self._device(device)
        marked = await self._in_thread(change_queries.mark, self._context, entry, ranges)
        return forms.Marked(device=naming.block_path(entry), marked_bytes=marked)

    async def doctor(self) -> list[forms.Finding]:
        return await self._in_thread(self._examine)

    async def repair(self) -> forms.Repaired:
        def run() -> forms.Repaired:
            fixed = repair.fix(
                self._examine(), take_away=lambda: left_over.take_away(self._context), runtime=self._runtime
            )
            return forms.Repaired(fixed=fixed, findings=self._examine())

        return await self._in_thread(run)

    async def status(self) -> forms.Status:
        return await self._in_thread(self._status)

    def events(self, since: int | None, *, follow: bool, snapshot: str | None) -> AsyncGenerator[EventBatch, None]:
        wanted = snapshot
        if snapshot is not None and len(snapshot) < 36:
            wanted = self._snapshot(snapshot).id
        return self._events.follow(since, follow=follow, snapshot=wanted)

    async def version(self) -> str:
        return installed_version()

    async def stop(self) -> None:
        self._stop()

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs an operation to its end; what it did not foresee becomes an error of ours."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except BlksnapError:
            raise
        except IoRefused as error:
            raise Failed(f"the io process: {error.strerror}", errno=errno_symbol(error.errno)) from error
        except OSError as error:
            raise from_os_error(error) from error

    def _device(self, text: str) -> DeviceEntry:
        return naming.find_device(self._context.catalogue, text)

    def _snapshot(self, text: str) -> SnapshotEntry:
        try:
            found = naming.find_snapshot(self._context.catalogue, text)
        except NotFound as error:
            end = self._events.end_of(text.lower())
            if end is None:
                raise
            advice = f"`blksnap-ublk events --snapshot {end.snapshot}` tells more"
            raise NotFound(
                f"no such snapshot any more, it was {end.type} at {end.time}", subject=text, advice=advice
            ) from error
        return broken.tell(self._context, found)

    def _snapshot_form(self, entry: SnapshotEntry) -> forms.Snapshot:
        current = broken.tell(self._context, entry)
        return report.snapshot_form(self._context, current, self._forecasts.seconds_left)

    def _storage_form(self, storage: StorageEntry) -> forms.Storage:
        return report.storage_form(self._context, storage, self._forecasts.seconds_left)

    def _joined(self, storage: Sequence[str]) -> str | None:
        """The full id of the snapshot whose storage `@SNAPSHOT` names; None where none does."""
        named = [spec.removeprefix(JOIN) for spec in storage if spec.startswith(JOIN)]
        if len(named) > 1:
            raise UsageError("--storage @SNAPSHOT is given more than once", advice="share the storage of one snapshot")
        return naming.find_snapshot(self._context.catalogue, named[0]).id if named else None

    def _examine(self) -> list[forms.Finding]:
        features = granted_features()
        found = left_over.look(self._context, self._runtime)
        return doctor.examine(None if features is None else int(features), found, runtime=self._runtime)

    def _status(self) -> forms.Status:
        inventory = self._context.io.inventory()
        reports = {found.device: found for found in inventory.devices}
        devices = []
        for entry in naming.served_devices(self._context.catalogue):
            found = reports.get(entry.key)
            reads, read_bytes, writes, written_bytes = _disk_counters(naming.block_path(entry))
            devices.append(
                forms.DeviceStatus(
                    device=report.device_form(self._context, entry),
                    traffic=forms.Traffic(
                        reads=reads,
                        writes=writes,
                        read_bytes=read_bytes,
                        written_bytes=written_bytes,
                        preserved_bytes=found.copied if found is not None else 0,
                    ),
                    rates=None,
                )
            )
        return forms.Status(
            time=forms.timestamp(time.time()),
            pid=os.getpid(),
            version=installed_version(),
            devices=devices,
            snapshots=[self._snapshot_form(entry) for entry in naming.held_snapshots(self._context.catalogue)],
        )


def _disk_counters(path: str) -> tuple[int, int, int, int]:
    """Reads, bytes read, writes, bytes written, as the kernel counts them; zeroes for a disk that has gone."""
    fields = (sysfs.text(Path("/sys/block") / os.path.basename(path), "stat") or "").split()
    if len(fields) < 7:
        return 0, 0, 0, 0
    return int(fields[0]), int(fields[2]) * _SECTOR, int(fields[4]), int(fields[6]) * _SECTOR
