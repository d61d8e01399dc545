# SPDX-License-Identifier: MIT
"""What all operations on devices and snapshots work with: the other processes, the state files, the locks."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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


class DeviceLocks:
    """One lock for each device, and `devices` for changes of the set of them. Held while an operation runs.

    Order: device locks in the order of their keys, then `devices`.
    """

    def __init__(self) -> None:
        self.devices = threading.Lock()
        self._own = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    @contextmanager
    def holding(self, keys: Iterable[str]) -> Iterator[None]:
        """Holds the locks of some devices; they wait for other operations on them."""
        with ExitStack() as stack:
            for key in sorted(set(keys)):
                with self._own:
                    lock = self._locks.setdefault(key, threading.Lock())
                stack.enter_context(lock)
            yield


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
    locks: DeviceLocks = field(default_factory=DeviceLocks)
    histories: dict[str, History] = field(default_factory=dict)
    """By device key."""
    conditions: dict[str, DeviceState] = field(default_factory=dict)
    """By device key; a device that is not in it is live."""
