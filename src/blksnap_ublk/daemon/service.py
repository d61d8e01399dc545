# SPDX-License-Identifier: MIT
"""What the daemon can do, whoever asks: one async method for each command.

DEVICE arguments (`device: str`) are what CLI users write: with a `/` the path of the origin, of the filtered device,
or of a symlink to either; otherwise the name given at attach. SNAPSHOT arguments (`snapshot: str`) are a UUID or an
unambiguous prefix of at least 4 characters. Paths are absolute.

Methods run in one event loop, several at a time; what blocks is done in threads. A method that was begun runs to its
end even when its caller is gone. All raise BlksnapError: UsageError for values out of bounds, NotFound for a DEVICE or
SNAPSHOT that does not exist, and what is named below.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blksnap_ublk.calls import EventBatch
from blksnap_ublk.forms import (
    Attached,
    Changes,
    ChangesInfo,
    Destroyed,
    Detached,
    Device,
    Finding,
    Freeze,
    Marked,
    Range,
    Repaired,
    Resized,
    Snapshot,
    SnapshotCheck,
    SnapshotCreated,
    Status,
    Storage,
)


@dataclass(frozen=True)
class ChangesAnswer:
    """Changes as arrays: `form` with an empty list of ranges, and `ranges` of shape (n, 2): byte start, byte length."""

    form: Changes
    ranges: NDArray[np.int64]


class Service(Protocol):
    """The daemon, as its callers see it."""

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
    ) -> Attached:
        """Serve the filtered device of the origin `device` (a path). None means the default; sizes are bytes.

        With `trust_offline` nobody wrote to the origin since it was detached, whatever it shows.

        Raises Busy (in use, attached already, name taken), Unsupported (no ublk, zoned, logical blocks too large).
        """
        ...

    async def detach(self, device: str, *, force: bool) -> Detached:
        """Write back the dirty cache and stop. Raises Busy while open, mounted or in a snapshot, unless `force`."""
        ...

    async def resize(self, device: str) -> Resized:
        """Give a filtered device the size that its origin has now.

        Raises Failed where the origin has shrunk, Unsupported (the kernel cannot), Busy (writes that do not end).
        """
        ...

    async def list_devices(self) -> list[Device]:
        """The filtered devices, by id."""
        ...

    async def create_snapshot(
        self,
        devices: Sequence[str],
        *,
        storage: Sequence[str],
        storage_files: Sequence[str],
        limit: int | None,
        on_overflow: str | None,
        freeze: Freeze,
        partitions: bool,
        ttl: float | None,
        while_pid: int | None,
        wipe: bool,
        copy_rate: int | None,
    ) -> SnapshotCreated:
        """One snapshot of all `devices` at one instant; images and symlinks exist when it returns.

        `storage` are SPECs, or one `@SNAPSHOT` whose storage is shared; `storage_files` paths that are never split;
        `limit` in bytes; `on_overflow` is `break` (also where it is None), `pause:SECONDS` or `evict-oldest`. With
        `partitions` the images show theirs. It ends by itself after `ttl` seconds, and when the process `while_pid` has
        ended. `wipe`: what the storage held is overwritten when it is given back; `copy_rate`: bytes per second that
        copy-on-write may write to it. Raises Busy (an area or file in use, writers that do not drain), Unsupported
        (storage that cannot be used; a freeze that was required).
        """
        ...

    async def list_snapshots(self) -> list[Snapshot]:
        """The held snapshots, oldest first, broken ones included."""
        ...

    async def show_snapshot(self, snapshot: str) -> Snapshot:
        """One snapshot."""
        ...

    async def check_snapshot(self, snapshot: str) -> SnapshotCheck:
        """Whether the snapshot can be trusted. A broken one is an answer, not an error."""
        ...

    async def renew_snapshot(self, snapshot: str, *, ttl: float | None) -> Snapshot:
        """Let a snapshot last for its time to live, or for another of `ttl` seconds, from now on.

        Raises UsageError where it has none and none is given.
        """
        ...

    async def destroy_snapshots(self, snapshots: Sequence[str], *, force: bool) -> Destroyed:
        """Remove snapshots. All are looked up, and refused if one does not exist, before the first is removed.

        Raises Busy while an image is open, unless `force`, which ends its readers with errors. The first that is
        refused ends it; the error names those that are gone.
        """
        ...

    async def show_storage(self, snapshot: str) -> Storage:
        """The difference storage of a snapshot."""
        ...

    async def add_storage(self, snapshot: str, *, storage: Sequence[str], storage_files: Sequence[str]) -> Storage:
        """Make the difference storage of a snapshot larger at once; SPECs and paths as of `create_snapshot`.

        Raises Busy (an area or file in use), Unsupported, Failed (no room). Nothing has changed then.
        """
        ...

    async def limit_storage(self, snapshot: str, limit: int) -> Storage:
        """Let the difference storage of a snapshot grow by itself up to `limit` bytes, and no further."""
        ...

    async def throttle_storage(self, snapshot: str, copy_rate: int | None) -> Storage:
        """Let copy-on-write write at most `copy_rate` bytes per second to the storage of a snapshot; None: no limit."""
        ...

    async def show_changes(self, device: str, *, since: str | None, until: str | None) -> ChangesAnswer:
        """What changed between the cursor `since` (None: since tracking began) and the snapshot `until`.

        `until` None is the last snapshot taken. Raises UsageError for text that is no cursor, NotFound when there is
        no snapshot yet, Untrusted when `until` is broken.
        """
        ...

    async def describe_changes(self, device: str) -> ChangesInfo:
        """The state of change tracking."""
        ...

    async def last_change(self, device: str) -> NDArray[np.uint32]:
        """For each tracking block the change number of the interval in which it last changed, 0 for never.

        As of the last snapshot taken; shape (blocks,). The array does not change while it is read.
        """
        ...

    async def mark_changes(self, device: str, ranges: Sequence[Range]) -> Marked:
        """Make `ranges` (bytes) part of the next increment. Raises UsageError for one outside of the device."""
        ...

    async def doctor(self) -> list[Finding]:
        """What was found about this system; also answers where nothing can be attached."""
        ...

    async def repair(self) -> Repaired:
        """Put right what `doctor` complains of, where that needs no decision, and look again."""
        ...

    async def status(self) -> Status:
        """Everything that is served, with the counters of now; `rates` null."""
        ...

    def events(self, since: int | None, *, follow: bool, snapshot: str | None) -> AsyncGenerator[EventBatch, None]:
        """Events in their order, those with `seq` greater than `since`; with `follow` it goes on for ever.

        `since` None is the whole backlog, or with `follow` nothing but what comes. `snapshot` leaves out the others'.
        They come in batches, with `follow` an empty one first. Where events were lost from the backlog, one of type
        `lost` stands for them, whose data says `{"first": seq, "last": seq}`.
        """
        ...

    async def version(self) -> str:
        """The version of the daemon."""
        ...

    async def stop(self) -> None:
        """Begin to end, and return: devices in use are kept for recovery, idle ones removed."""
        ...
