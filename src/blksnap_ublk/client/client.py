# SPDX-License-Identifier: MIT
"""The typed client of the daemon."""

import base64
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from blksnap_ublk import calls, forms
from blksnap_ublk.client.event_stream import read_events
from blksnap_ublk.client.replaced_file import replaced_file, write_all
from blksnap_ublk.client.runtime import runtime_directory, socket_path
from blksnap_ublk.client.start import not_root, start_daemon
from blksnap_ublk.client.translate import errors_translated
from blksnap_ublk.errors import BlksnapError, Failed, from_os_error
from blksnap_ublk.varlink.connection import CallUnread, Connection

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from blksnap_ublk.client.changed_ranges import ChangedRanges

RANGES_PER_CALL = 4096
STOP_SECONDS = 60
UNREAD_CALLS = 3
"""Processes in a row that may end before they read a call; then nobody is asked any more."""

R = TypeVar("R")


def _log_warning(text: str) -> None:
    logging.getLogger("blksnap_ublk").warning("%s", text)


def connect(path: str | None = None, *, start: bool = True, warn: Callable[[str], None] = _log_warning) -> "Client":
    """A client of the daemon that listens on the socket `path`, by default that of the runtime directory.

    Without a `path`, and with `start`, the daemon is started where it is not running and systemd does not own it.
    `warn` gets each thing that the user should know although the call succeeded. Raises BlksnapError.
    """
    client = Client(path, start=start, warn=warn)
    client.connect()
    return client


class Client:
    """The commands as methods. All raise BlksnapError; see `connect` for how to get one. For one thread at a time.

    DEVICE arguments are paths of the origin or of the filtered device, or the name given at attach; SNAPSHOT
    arguments a UUID or at least 4 characters of its beginning. Relative paths are the caller's. Sizes are bytes.
    """

    def __init__(self, path: str | None, *, start: bool, warn: Callable[[str], None], hooks: str | None = None) -> None:
        """`hooks`: for a daemon that this client starts, the directory of its hooks where it is not the usual one."""
        self.path = socket_path() if path is None else os.path.abspath(path)
        self._start = start and path is None
        self._warn = warn
        self._hooks = None if hooks is None else os.path.abspath(hooks)
        self._connection: Connection | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the daemon goes on."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # Devices

    def attach(
        self,
        device: str,
        *,
        name: str | None = None,
        queues: int | None = None,
        depth: int | None = None,
        tracking_block: int | None = None,
        unit: int | None = None,
        trust_offline: bool = False,
    ) -> forms.Device:
        """Serve the filtered device of the origin at path `device`; None means the default.

        `trust_offline`: nobody has written to the origin since it was detached, whatever it shows.
        """
        attached = self._call(
            "Attach",
            calls.Attach(
                device=_absolute(device),
                name=name,
                queues=queues,
                depth=depth,
                tracking_block=tracking_block,
                unit=unit,
                trust_offline=trust_offline,
            ),
            forms.Attached,
        )
        self._pass_on(attached.warnings)
        return attached.device

    def detach(self, device: str, *, force: bool = False) -> forms.Detached:
        """Write back the dirty cache and stop; `force` also while in use."""
        detached = self._call("Detach", calls.Detach(device=_device(device), force=force), forms.Detached)
        self._pass_on(detached.warnings)
        return detached

    def resize(self, device: str) -> forms.Resized:
        """Give a filtered device the size of its origin, which has grown; snapshots that are held keep theirs."""
        return self._call("Resize", calls.OneDevice(device=_device(device)), forms.Resized)

    def list_devices(self) -> list[forms.Device]:
        """The filtered devices."""
        return self._call("ListDevices", calls.NoParameters(), forms.DeviceList).devices

    # Snapshots

    def create_snapshot(
        self,
        devices: Sequence[str],
        *,
        storage: Sequence[str] = (),
        storage_files: Sequence[str] = (),
        limit: int | None = None,
        on_overflow: str | None = None,
        freeze: forms.Freeze = forms.Freeze.TRY,
        partitions: bool = False,
        ttl: float | None = None,
        while_pid: int | None = None,
        wipe: bool = False,
        copy_rate: int | None = None,
    ) -> forms.Snapshot:
        """One snapshot of all `devices` at one instant; `storage` are SPECs, `storage_files` plain paths.

        A single SPEC `@SNAPSHOT` shares the storage of that one. With `partitions` the images show theirs. It ends by
        itself, whoever uses it then, `ttl` seconds after it was taken or last renewed, and when the process `while_pid`
        (`os.getpid()`: this one) has ended. When the storage is full: `on_overflow` (`break`, `pause:SECONDS` or
        `evict-oldest`). `wipe` overwrites what it held when it is given back; copy-on-write writes at most `copy_rate`
        bytes per second to it.
        """
        created = self._call(
            "CreateSnapshot",
            calls.CreateSnapshot(
                devices=[_device(device) for device in devices],
                storage=[spec if spec.startswith("@") else _absolute(spec) for spec in storage],
                storage_files=[_absolute(path) for path in storage_files],
                limit=limit,
                on_overflow=on_overflow,
                freeze=freeze,
                partitions=partitions,
                ttl=ttl,
                while_pid=while_pid,
                wipe=wipe,
                copy_rate=copy_rate,
            ),
            forms.SnapshotCreated,
        )
        self._pass_on(created.warnings)
        return created.snapshot

    def list_snapshots(self) -> list[forms.Snapshot]:
        """The held snapshots, oldest first."""
        return self._call("ListSnapshots", calls.NoParameters(), forms.SnapshotList).snapshots

    def show_snapshot(self, snapshot: str) -> forms.Snapshot:
        """One snapshot."""
        return self._call("ShowSnapshot", calls.OneSnapshot(snapshot=snapshot), forms.Snapshot)

    def check_snapshot(self, snapshot: str) -> forms.SnapshotCheck:
        """Whether the snapshot can be trusted, and if not, why."""
        return self._call("CheckSnapshot", calls.OneSnapshot(snapshot=snapshot), forms.SnapshotCheck)

    def renew_snapshot(self, snapshot: str, *, ttl: float | None = None) -> forms.Snapshot:
        """Let a snapshot last for its time to live, or for another of `ttl` seconds, from now on.

        Raises UsageError where it has none and none is given, NotFound when its time is over.
        """
        return self._call("RenewSnapshot", calls.RenewSnapshot(snapshot=snapshot, ttl=ttl), forms.Snapshot)

    def destroy_snapshots(self, snapshots: Sequence[str], *, force: bool = False) -> list[str]:
        """Remove snapshots; `force` also while their images are open. The UUIDs of those that are gone.

        The first that is refused ends it; the error names those that are gone.
        """
        parameters = calls.DestroySnapshots(snapshots=list(snapshots), force=force)
        destroyed = self._call("DestroySnapshots", parameters, forms.Destroyed)
        self._pass_on(destroyed.warnings)
        return destroyed.destroyed

    # Difference storage

    def show_storage(self, snapshot: str) -> forms.Storage:
        """The difference storage of a snapshot."""
        return self._call("ShowStorage", calls.OneSnapshot(snapshot=snapshot), calls.StorageReply).storage

    def add_storage(
        self, snapshot: str, storage: Sequence[str] = (), *, storage_files: Sequence[str] = ()
    ) -> forms.Storage:
        """Make it larger at once by SPECs and plain paths."""
        parameters = calls.AddStorage(
            snapshot=snapshot,
            storage=[_absolute(spec) for spec in storage],
            storage_files=[_absolute(path) for path in storage_files],
        )
        return self._call("AddStorage", parameters, calls.StorageReply).storage

    def limit_storage(self, snapshot: str, limit: int) -> forms.Storage:
        """Let it grow by itself up to `limit` bytes, and no further."""
        return self._call(
            "LimitStorage", calls.LimitStorage(snapshot=snapshot, limit=limit), calls.StorageReply
        ).storage

    def throttle_storage(self, snapshot: str, copy_rate: int | None) -> forms.Storage:
        """Let copy-on-write write at most `copy_rate` bytes per second to it; None: no limit."""
        parameters = calls.ThrottleStorage(snapshot=snapshot, copy_rate=copy_rate)
        return self._call("ThrottleStorage", parameters, calls.StorageReply).storage

    # Changes

    def changes(self, device: str, *, since: str | None = None, until: str | None = None) -> "ChangedRanges":
        """What changed between the cursor `since` (None: since tracking began) and the snapshot `until`.

        `until` None is the last snapshot taken. The ranges are an int64 array of shape (n, 2).
        """
        from blksnap_ublk.client.changed_ranges import joined

        return joined(self.changes_in_portions(device, since=since, until=until))

    def changes_in_portions(
        self, device: str, *, since: str | None = None, until: str | None = None
    ) -> Iterator[forms.Changes]:
        """The same as forms that carry the next ranges each and are equal otherwise: for answers of any length."""
        parameters = calls.ShowChanges(device=_device(device), since=since, until=until)
        return self._stream("ShowChanges", parameters, forms.Changes)

    def describe_changes(self, device: str) -> forms.ChangesInfo:
        """The state of change tracking."""
        return self._call("DescribeChanges", calls.OneDevice(device=_device(device)), forms.ChangesInfo)

    def last_change(self, device: str) -> "NDArray[np.uint32]":
        """For each tracking block the change number of the interval in which it last changed; 0 for never."""
        import io

        import numpy as np

        array: NDArray[np.uint32] = np.load(io.BytesIO(b"".join(self._dump(device))), allow_pickle=False)
        return array

    def dump_changes(self, device: str, path: str) -> None:
        """Write the array of `last_change` to the `.npy` file `path`, which comes into being whole or not at all."""
        try:
            with replaced_file(path) as descriptor:
                for data in self._dump(device):
                    write_all(descriptor, data)
        except OSError as error:
            raise from_os_error(error, subject=path) from error

    def mark_changes(self, device: str, ranges: Iterable[tuple[int, int] | forms.Range]) -> forms.Marked:
        """Make byte ranges, (start, length) each, part of the next increment.

        In several calls where there are many ranges: an error may leave some of them marked.
        """
        wanted = [
            entry if isinstance(entry, forms.Range) else forms.Range(start=int(entry[0]), length=int(entry[1]))
            for entry in ranges
        ]
        name, marked_bytes = "", 0
        for begin in range(0, max(1, len(wanted)), RANGES_PER_CALL):
            parameters = calls.MarkChanges(device=_device(device), ranges=wanted[begin : begin + RANGES_PER_CALL])
            marked = self._call("MarkChanges", parameters, forms.Marked)
            name, marked_bytes = marked.device, marked_bytes + marked.marked_bytes
        return forms.Marked(device=name, marked_bytes=marked_bytes)

    def mark_file(self, device: str, path: str) -> forms.Marked:
        """Make the file `path`, on a file system on the filtered device, part of the next increment."""
        from blksnap_ublk.client.file_ranges import file_ranges

        return self.mark_changes(device, file_ranges(path, self.describe_changes(device).device))

    # The daemon

    def doctor(self) -> list[forms.Finding]:
        """What is fit or unfit about this system. Answers, with the reason, also where no daemon can be started."""
        no_daemon = self._no_daemon()
        if no_daemon is None:
            return self._call("Doctor", calls.NoParameters(), forms.Findings).findings
        from blksnap_ublk.host.doctor import examine

        return [no_daemon, *examine(None, runtime=Path(runtime_directory()))]

    def repair(self) -> forms.Repaired:
        """Put right what `doctor` complains of, where that needs no decision: udev rules, a filter for LVM, devices of
        ours that nobody serves. Does what it can also where no daemon can be started."""
        no_daemon = self._no_daemon()
        if no_daemon is None:
            return self._call("Repair", calls.NoParameters(), forms.Repaired)
        if os.geteuid() != 0:
            raise not_root()
        from blksnap_ublk.host.doctor import examine
        from blksnap_ublk.host.repair import fix

        runtime = Path(runtime_directory())
        fixed = fix(examine(None, runtime=runtime), runtime=runtime)
        return forms.Repaired(fixed=fixed, findings=[no_daemon, *examine(None, runtime=runtime)])

    def status(self) -> forms.Status:
        """Everything that is served; takes half a second, over which rates are measured."""
        return self._call("ShowStatus", calls.ShowStatus(), forms.Status)

    def follow_status(self, seconds: float = 1.0) -> Iterator[forms.Status]:
        """The status every so many seconds, without end."""
        return self._stream("ShowStatus", calls.ShowStatus(interval=int(seconds * 1000)), forms.Status)

    def events(
        self, *, since: int | None = None, follow: bool = False, snapshot: str | None = None
    ) -> Iterator[forms.Event]:
        """Events whose `seq` is greater than `since`; with `follow` without end, also when the daemon's process is
        replaced.

        `since` None is the whole backlog, or with `follow` nothing but what comes. An event `lost` stands for those
        that are no longer kept; its data has the `first` and the `last` number.
        """
        parameters = calls.ReadEvents(since=since, follow=follow, snapshot=snapshot)
        with errors_translated():
            yield from read_events(self._connected(), lambda: Connection(self.path), parameters)

    def daemon_version(self) -> calls.DaemonVersion:
        """Version and process of the daemon."""
        return self._call("GetVersion", calls.NoParameters(), calls.DaemonVersion)

    def stop(self) -> None:
        """Let the daemon end, and wait for that: devices in use are kept for recovery, idle ones removed.

        Raises Failed when it still listens after 60 seconds.
        """
        with errors_translated():
            while True:
                self.connect()
                assert self._connection is not None
                try:
                    self._connection.call(f"{calls.INTERFACE}.Stop", calls.NoParameters(), calls.Nothing)
                    break
                except CallUnread:
                    if not self._listens():  # somebody else has stopped it
                        break
        self.close()
        deadline = time.monotonic() + STOP_SECONDS
        while self._listens():
            if time.monotonic() > deadline:
                raise Failed(f"the daemon has not ended after {STOP_SECONDS} seconds", advice="its log says why")
            time.sleep(0.05)

    # The connection

    def connect(self) -> None:
        """Connect, where there is no usable connection; called by every method. Raises BlksnapError."""
        if self._connection is None or not self._connection.usable():
            self.close()
            self._connection = self._connected()

    def _connected(self) -> Connection:
        try:
            return Connection(self.path)
        except PermissionError as error:
            raise not_root() from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if not self._start:
                raise Failed(f"no daemon listens on {self.path}", advice="start one: blksnap-ublk serve") from error
        except OSError as error:
            raise from_os_error(error, subject=self.path) from error
        start_daemon(runtime_directory(), self._listens, self._hooks)
        try:
            return Connection(self.path)
        except OSError as error:
            raise Failed(f"the daemon ended as soon as it had started ({error})", advice="its log says why") from error

    def _no_daemon(self) -> forms.Finding | None:
        """Connects; a daemon that cannot be started is a finding. Raises BlksnapError where none may be started."""
        try:
            self.connect()
        except BlksnapError as error:
            if not self._start:
                raise
            return forms.Finding(name="daemon", state=forms.FindingState.FAIL, text=error.message, advice=None)
        return None

    def _listens(self) -> bool:
        try:
            Connection(self.path).close()
        except OSError:
            return False
        return True

    def _call(self, method: str, parameters: object, reply: type[R]) -> R:
        with errors_translated():
            unread = 0
            while True:
                self.connect()
                assert self._connection is not None
                try:
                    return self._connection.call(f"{calls.INTERFACE}.{method}", parameters, reply)
                except CallUnread:
                    unread += 1
                    if unread == UNREAD_CALLS:
                        raise

    def _stream(self, method: str, parameters: object, reply: type[R]) -> Iterator[R]:
        # On a connection of its own: a stream that is left early ends its connection, and others go on meanwhile.
        with errors_translated():
            unread = 0
            while True:
                with self._connected() as connection:
                    try:
                        yield from connection.stream(f"{calls.INTERFACE}.{method}", parameters, reply)
                        return
                    except CallUnread:
                        unread += 1
                        if unread == UNREAD_CALLS:
                            raise

    def _dump(self, device: str) -> Iterator[bytes]:
        received = size = 0
        for portion in self._stream("DumpChanges", calls.OneDevice(device=_device(device)), calls.DumpPortion):
            data = base64.b64decode(portion.data)
            received, size = received + len(data), portion.size
            yield data
        if received != size:
            raise Failed(f"the daemon sent {received} bytes of {size}")

    def _pass_on(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            self._warn(warning)


def _device(device: str) -> str:
    """A DEVICE as the daemon understands it: what contains a `/` is a path."""
    return _absolute(device) if "/" in device else device


def _absolute(path: str) -> str:
    # Not os.path.abspath: a SPEC ends in more than a path, and `..` after a symlink leads elsewhere.
    return path if path.startswith("/") else os.path.join(os.getcwd(), path)
