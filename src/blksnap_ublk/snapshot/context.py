# SPDX-License-Identifier: MIT
"""What all operations on devices and snapshots work with: the other processes, the state files, the locks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from uuid import UUID

from blksnap_ublk.cbt import History
from blksnap_ublk.forms import DeviceState
from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.snapshot.catalogue import Catalogue
from blksnap_ublk.snapshot.disks import Disks
from blksnap_ublk.snapshot.io_link import IoLink
from blksnap_ublk.snapshot.keyed_locks import KeyedLocks
from blksnap_ublk.snapshot.state_files import StateFiles
from blksnap_ublk.snapshot.storage import DescriptorRegistry


class Emit(Protocol):
    """Tells the users of `events` of a change; any thread may call it."""

    def __call__(
        self, kind: str, *, snapshot: str | None = None, device: str | None = None, **data: object
    ) -> None: ...


class DeviceLocks(KeyedLocks):
    """One lock for each device, by its key, and `devices` for changes of the set of them. Held while an operation runs.

    Order of all locks: device locks, then `devices`, then `Context.storage_locks`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.devices = threading.Lock()


class Growing:
    """Files of storages that are made longer keep the freezing of file systems waiting for a time, and the other way
    round. Several files may be made longer at the same time, and several snapshots be taken.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._extending = 0
        self._freezing = 0

    @contextmanager
    def extending(self) -> Iterator[None]:
        """While a file is made longer; begins when nothing is frozen."""
        with self._changed:
            self._changed.wait_for(lambda: self._freezing == 0)
            self._extending += 1
        try:
            yield
        finally:
            with self._changed:
                self._extending -= 1
                self._changed.notify_all()

    def acquire(self, timeout: float) -> bool:
        """Before freezing: no file begins to be made longer from now on until `release`.

        False, and nothing to release, when one still was being made longer after `timeout` seconds.
        """
        with self._changed:
            self._freezing += 1
            if self._changed.wait_for(lambda: self._extending == 0, timeout):
                return True
            self._freezing -= 1
            self._changed.notify_all()
            return False

    def release(self) -> None:
        """When all is thawed."""
        with self._changed:
            self._freezing -= 1
            self._changed.notify_all()


@dataclass
class Context:
    """The parts, and the little that only memory knows."""

    io: IoLink
    keeper: KeeperClient
    disks: Disks
    state: StateFiles
    catalogue: Catalogue
    registry: DescriptorRegistry
    emit: Emit
    hooks: Path | None = None
    """The directory with what is run before and after a snapshot is taken."""
    saved: Path | None = None
    """The directory on a disk with the change maps of what is not attached; None: they are not saved."""
    locks: DeviceLocks = field(default_factory=DeviceLocks)
    storage_locks: KeyedLocks = field(default_factory=KeyedLocks)
    """By storage key while its snapshots come or go, by file while one is opened."""
    growing: Growing = field(default_factory=Growing)
    """Files of storages are made longer, or something is frozen, but not both."""
    reach: dict[str, int] = field(default_factory=dict)
    """By storage key: the bytes that it can have at most, with what growth may still add."""
    open_storages: set[str] = field(default_factory=set)
    """Keys of the storages whose descriptors this process holds."""
    histories: dict[str, History] = field(default_factory=dict)
    """By device key."""
    ended_histories: dict[str, tuple[int, UUID]] = field(default_factory=dict)
    """By device key: number and generation of a history which is to be begun again, where that has failed so far."""
    conditions: dict[str, DeviceState] = field(default_factory=dict)
    """By device key; a device that is not in it is live."""
    unsettled: set[str] = field(default_factory=set)
    """Ids of snapshots whose instant may have come without their devices' histories knowing it yet."""
    unfinished: set[str] = field(default_factory=set)
    """Ids of snapshots whose removal was broken off, and is to be tried again."""
    waiting: set[str] = field(default_factory=set)
    """Ids of snapshots whose images wait to be served again."""
    refused: dict[str, float] = field(default_factory=dict)
    """By id of those: since when, of the monotonic clock, the io process of now or the kernel refuse to serve them."""
    quarantine: bool = False
    """The io process has not been told that the storage I/O of dead ones has ended."""
    io_died: float | None = None
    """When the io process before that of now was found dead, of the monotonic clock; None where nobody saw it."""
    sweeping: bool = False
    """The io process checks what a dead one left; until it has ended no image of that is served or dropped."""
    untold: list[int] | None = None
    """It has not begun with that, because it was not told which serials are lost: these."""
    making: set[str] = field(default_factory=set)
    """Keys of storages that are being opened for snapshots that are not in the catalogue yet."""
    buffers: set[str] = field(default_factory=set)
    """Names of buffers that are being handed to the io process, which does not tell of them yet."""
    handing_over: threading.Lock = field(default_factory=threading.Lock)
    """Held while such a name is chosen: no two devices get the same. Nothing is waited for meanwhile."""
    unheld: set[str] = field(default_factory=set)
    """Keys of storages in use, some of whose files this process could not open again yet."""

    def stop_waiting(self, snapshot_id: str) -> None:
        """Its images are served again, or never will be."""
        self.waiting.discard(snapshot_id)
        self.refused.pop(snapshot_id, None)
