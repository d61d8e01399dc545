# SPDX-License-Identifier: MIT
"""What all operations on devices and snapshots work with: the other processes, the state files, the locks."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from blksnap_ublk.cbt import History
from blksnap_ublk.forms import DeviceState
from blksnap_ublk.keeper.client import KeeperClient
from blksnap_ublk.snapshot.catalogue import Catalogue
from blksnap_ublk.snapshot.disks import Disks
from blksnap_ublk.snapshot.io_link import IoLink
from blksnap_ublk.snapshot.state_files import StateFiles
from blksnap_ublk.snapshot.storage import DescriptorRegistry


class Emit(Protocol):
    """Tells the users of `events` of a change; any thread may call it."""

    def __call__(
        self, kind: str, *, snapshot: str | None = None, device: str | None = None, **data: object
    ) -> None: ...


class KeyedLocks:
    """One lock for each key, which exists while somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._own = threading.Lock()
        self._locks: dict[str, _Counted] = {}

    @contextmanager
    def holding(self, keys: Iterable[str]) -> Iterator[None]:
        """Holds the locks of some keys, taken in their order, so that several callers never wait for one another."""
        with ExitStack() as stack:
            for key in sorted(set(keys)):
                stack.enter_context(self._holding(key))
            yield

    @contextmanager
    def _holding(self, key: str) -> Iterator[None]:
        with self._own:
            counted = self._locks.setdefault(key, _Counted())
            counted.users += 1
        try:
            with counted.lock:
                yield
        finally:
            with self._own:
                counted.users -= 1
                if counted.users == 0:
                    del self._locks[key]


class DeviceLocks(KeyedLocks):
    """One lock for each device, by its key, and `devices` for changes of the set of them. Held while an operation runs.

    Order of all locks: device locks, then `devices`, then `Context.storage_locks`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.devices = threading.Lock()


@dataclass
class _Counted:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


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
    locks: DeviceLocks = field(default_factory=DeviceLocks)
    storage_locks: KeyedLocks = field(default_factory=KeyedLocks)
    """By storage key while its snapshots come or go, by file while one is opened."""
    open_storages: set[str] = field(default_factory=set)
    """Keys of the storages whose descriptors this process holds."""
    histories: dict[str, History] = field(default_factory=dict)
    """By device key."""
    conditions: dict[str, DeviceState] = field(default_factory=dict)
    """By device key; a device that is not in it is live."""
    unsettled: set[str] = field(default_factory=set)
    """Ids of snapshots whose instant may have come without their devices' histories knowing it yet."""
