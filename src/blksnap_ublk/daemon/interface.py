# SPDX-License-Identifier: MIT
"""The varlink interface `io.blksnap.Ublk`: each of its methods is a call of the Service."""

import asyncio
import base64
import importlib.resources
import io
import logging
import os
from contextlib import aclosing

import msgspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from blksnap_ublk import calls, forms
from blksnap_ublk.daemon.rates import with_rates
from blksnap_ublk.daemon.service import ChangesAnswer, Service
from blksnap_ublk.errors import BlksnapError, Failed
from blksnap_ublk.varlink.interface import Call, Interface, Method
from blksnap_ublk.varlink.wire import VarlinkError, expected_more

RANGES_PER_REPLY = 1 << 14
NUMBERS_PER_REPLY = 3 << 16
STATUS_INTERVAL_MS = 500

# Read once, when this is imported: later the file may lie on a device that waits for this process.
_DESCRIPTION = importlib.resources.files(__package__).joinpath(f"{calls.INTERFACE}.varlink").read_text()

log = logging.getLogger(__name__)


def ublk_interface(service: Service) -> Interface:
    """The interface, served by `service`."""
    handlers = _Handlers(service)
    return Interface(
        name=calls.INTERFACE,
        description=_DESCRIPTION,
        methods={
            "Attach": Method(calls.Attach, handlers.attach),
            "Detach": Method(calls.Detach, handlers.detach),
            "Resize": Method(calls.OneDevice, handlers.resize),
            "ListDevices": Method(calls.NoParameters, handlers.list_devices),
            "CreateSnapshot": Method(calls.CreateSnapshot, handlers.create_snapshot),
            "ListSnapshots": Method(calls.NoParameters, handlers.list_snapshots),
            "ShowSnapshot": Method(calls.OneSnapshot, handlers.show_snapshot),
            "CheckSnapshot": Method(calls.OneSnapshot, handlers.check_snapshot),
            "RenewSnapshot": Method(calls.RenewSnapshot, handlers.renew_snapshot),
            "DestroySnapshots": Method(calls.DestroySnapshots, handlers.destroy_snapshots),
            "ShowStorage": Method(calls.OneSnapshot, handlers.show_storage),
            "AddStorage": Method(calls.AddStorage, handlers.add_storage),
            "LimitStorage": Method(calls.LimitStorage, handlers.limit_storage),
            "ThrottleStorage": Method(calls.ThrottleStorage, handlers.throttle_storage),
            "ShowChanges": Method(calls.ShowChanges, handlers.show_changes, stream=True),
            "DescribeChanges": Method(calls.OneDevice, handlers.describe_changes),
            "DumpChanges": Method(calls.OneDevice, handlers.dump_changes, stream=True),
            "MarkChanges": Method(calls.MarkChanges, handlers.mark_changes),
            "Doctor": Method(calls.NoParameters, handlers.doctor),
            "Repair": Method(calls.NoParameters, handlers.repair),
            "ShowStatus": Method(calls.ShowStatus, handlers.show_status, stream=True),
            "ReadEvents": Method(calls.ReadEvents, handlers.read_events, stream=True),
            "GetVersion": Method(calls.NoParameters, handlers.get_version),
            "Stop": Method(calls.NoParameters, handlers.stop),
        },
        to_error=to_error,
    )


def to_error(error: Exception) -> VarlinkError:
    """The error reply for an exception of the service; one that is not a BlksnapError is logged with its traceback."""
    if not isinstance(error, BlksnapError):
        log.error("a call failed unexpectedly", exc_info=error)
        error = Failed(f"internal error: {type(error).__name__}: {error}", advice="the daemon's log has more")
    return VarlinkError(error.error_name, {"message": error.message})


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def attach(self, parameters: calls.Attach, call: Call) -> forms.Attached:
        return await self._service.attach(
            parameters.device,
            name=parameters.name,
            queues=parameters.queues,
            depth=parameters.depth,
            tracking_block=parameters.tracking_block,
            unit=parameters.unit,
            trust_offline=bool(parameters.trust_offline),
        )

    async def detach(self, parameters: calls.Detach, call: Call) -> forms.Detached:
        return await self._service.detach(parameters.device, force=bool(parameters.force))

    async def resize(self, parameters: calls.OneDevice, call: Call) -> forms.Resized:
        return await self._service.resize(parameters.device)

    async def list_devices(self, parameters: calls.NoParameters, call: Call) -> forms.DeviceList:
        return forms.DeviceList(devices=await self._service.list_devices())

    async def create_snapshot(self, parameters: calls.CreateSnapshot, call: Call) -> forms.SnapshotCreated:
        return await self._service.create_snapshot(
            parameters.devices,
            storage=parameters.storage or [],
            storage_files=parameters.storage_files or [],
            limit=parameters.limit,
            on_overflow=parameters.on_overflow,
            freeze=parameters.freeze or forms.Freeze.TRY,
            partitions=bool(parameters.partitions),
            ttl=parameters.ttl,
            while_pid=parameters.while_pid,
            wipe=bool(parameters.wipe),
            copy_rate=parameters.copy_rate,
        )

    async def list_snapshots(self, parameters: calls.NoParameters, call: Call) -> forms.SnapshotList:
        return forms.SnapshotList(snapshots=await self._service.list_snapshots())

    async def show_snapshot(self, parameters: calls.OneSnapshot, call: Call) -> forms.Snapshot:
        return await self._service.show_snapshot(parameters.snapshot)

    async def check_snapshot(self, parameters: calls.OneSnapshot, call: Call) -> forms.SnapshotCheck:
        return await self._service.check_snapshot(parameters.snapshot)

    async def renew_snapshot(self, parameters: calls.RenewSnapshot, call: Call) -> forms.Snapshot:
        return await self._service.renew_snapshot(parameters.snapshot, ttl=parameters.ttl)

    async def destroy_snapshots(self, parameters: calls.DestroySnapshots, call: Call) -> forms.Destroyed:
        return await self._service.destroy_snapshots(parameters.snapshots, force=bool(parameters.force))

    async def show_storage(self, parameters: calls.OneSnapshot, call: Call) -> calls.StorageReply:
        return calls.StorageReply(storage=await self._service.show_storage(parameters.snapshot))

    async def add_storage(self, parameters: calls.AddStorage, call: Call) -> calls.StorageReply:
        storage = await self._service.add_storage(
            parameters.snapshot, storage=parameters.storage or [], storage_files=parameters.storage_files or []
        )
        return calls.StorageReply(storage=storage)

    async def limit_storage(self, parameters: calls.LimitStorage, call: Call) -> calls.StorageReply:
        return calls.StorageReply(storage=await self._service.limit_storage(parameters.snapshot, parameters.limit))

    async def throttle_storage(self, parameters: calls.ThrottleStorage, call: Call) -> calls.StorageReply:
        storage = await self._service.throttle_storage(parameters.snapshot, parameters.copy_rate)
        return calls.StorageReply(storage=storage)

    async def show_changes(self, parameters: calls.ShowChanges, call: Call) -> forms.Changes:
        """Each reply carries the same fields and the next ranges."""
        answer = await self._service.show_changes(parameters.device, since=parameters.since, until=parameters.until)
        last = max(0, (len(answer.ranges) - 1) // RANGES_PER_REPLY) * RANGES_PER_REPLY
        if last and not call.more:
            raise expected_more()
        for begin in range(0, last, RANGES_PER_REPLY):
            await call.send(_portion(answer, begin))
        return _portion(answer, last)

    async def describe_changes(self, parameters: calls.OneDevice, call: Call) -> forms.ChangesInfo:
        return await self._service.describe_changes(parameters.device)

    async def dump_changes(self, parameters: calls.OneDevice, call: Call) -> calls.DumpPortion:
        if not call.more:
            raise expected_more()
        array = (await self._service.last_change(parameters.device)).astype("<u4", copy=False)
        head = io.BytesIO()
        npy.write_array_header_1_0(head, npy.header_data_from_array_1_0(array))
        header = head.getvalue()
        size = len(header) + array.nbytes
        await call.send(calls.DumpPortion(size=size, data=base64.b64encode(header).decode()))
        last = max(0, (len(array) - 1) // NUMBERS_PER_REPLY) * NUMBERS_PER_REPLY
        for begin in range(0, last, NUMBERS_PER_REPLY):
            await call.send(_numbers(array[begin : begin + NUMBERS_PER_REPLY], size))
        return _numbers(array[last:], size)

    async def mark_changes(self, parameters: calls.MarkChanges, call: Call) -> forms.Marked:
        return await self._service.mark_changes(parameters.device, parameters.ranges)

    async def doctor(self, parameters: calls.NoParameters, call: Call) -> forms.Findings:
        return forms.Findings(findings=await self._service.doctor())

    async def repair(self, parameters: calls.NoParameters, call: Call) -> forms.Repaired:
        return await self._service.repair()

    async def show_status(self, parameters: calls.ShowStatus, call: Call) -> forms.Status:
        """One status, or with `more` one for each interval, without end."""
        interval = max(10, STATUS_INTERVAL_MS if parameters.interval is None else parameters.interval) / 1000
        clock = asyncio.get_running_loop().time
        before, then = await self._service.status(), clock()
        while True:
            if before.devices or call.more:
                await asyncio.sleep(interval)
            after, now = await self._service.status(), clock()
            status = with_rates(before, after, max(now - then, 0.001))
            if not call.more:
                return status
            await call.send(status)
            before, then = after, now

    async def read_events(self, parameters: calls.ReadEvents, call: Call) -> calls.EventBatch:
        follow = bool(parameters.follow)
        if follow and not call.more:
            raise expected_more()
        events: list[forms.Event] = []
        seq = 0
        batches = self._service.events(parameters.since, follow=follow, snapshot=parameters.snapshot)
        async with aclosing(batches):
            async for batch in batches:
                seq = batch.seq
                if call.more:
                    await call.send(batch)
                else:
                    events += batch.events
        return calls.EventBatch(events=events, seq=seq)

    async def get_version(self, parameters: calls.NoParameters, call: Call) -> calls.DaemonVersion:
        return calls.DaemonVersion(version=await self._service.version(), pid=os.getpid())

    async def stop(self, parameters: calls.NoParameters, call: Call) -> calls.Nothing:
        await self._service.stop()
        return calls.Nothing()


def _portion(answer: ChangesAnswer, begin: int) -> forms.Changes:
    pairs = answer.ranges[begin : begin + RANGES_PER_REPLY].tolist()
    return msgspec.structs.replace(
        answer.form, ranges=[forms.Range(start=start, length=length) for start, length in pairs]
    )


def _numbers(part: NDArray[np.uint32], size: int) -> calls.DumpPortion:
    return calls.DumpPortion(size=size, data=base64.b64encode(part.tobytes()).decode())
