# SPDX-License-Identifier: MIT
"""Which file systems are above a set of devices, and the order in which they can be frozen one by one."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from blksnap_ublk.errors import Unsupported
from blksnap_ublk.host import stack
from blksnap_ublk.host.mounts import Mount
from blksnap_ublk.host.number import DeviceNumber

_WITHOUT_DATA = frozenset({"overlay"})  # what lies on others has nothing to freeze: those are frozen


@dataclass(frozen=True)
class FileSystem:
    """One superblock: all its mounts, those of our own namespace first, and the block devices that it lies on.

    No mounts: it is in use, but nobody sees where.
    """

    mounts: tuple[Mount, ...]
    devices: frozenset[DeviceNumber]

    @property
    def number(self) -> DeviceNumber:
        """What mountinfo and, for most types, `st_dev` of its files say."""
        return self.mounts[0].device if self.mounts else min(self.devices)

    @property
    def point(self) -> str:
        """Where it is mounted, for messages."""
        return self.mounts[0].point if self.mounts else f"device {self.number}"

    @property
    def type(self) -> str:
        """`ext4`, `xfs` …"""
        return self.mounts[0].filesystem if self.mounts else "its file system"


def file_systems(
    mounts: Iterable[Mount],
    devices: Collection[DeviceNumber],
    devices_of: Callable[[Mount], frozenset[DeviceNumber]],
    carrying: Collection[DeviceNumber] = (),
) -> list[FileSystem]:
    """The writable file systems that lie on one of `devices`, each once, in the order of their first mounts.

    `carrying`: devices with a file system in use, also where `mounts` does not show it.
    """
    by_number: dict[DeviceNumber, list[Mount]] = {}
    unseen = set(carrying) & set(devices)
    for mount in mounts:
        unseen.discard(mount.device)
        if mount.filesystem not in _WITHOUT_DATA and not mount.file_system_read_only:
            by_number.setdefault(mount.device, []).append(mount)
    found = []
    for same in by_number.values():
        # A name in `source` may say nothing in our namespace, but it does in that of another mount.
        below = next((below for mount in same if (below := devices_of(mount))), frozenset())
        if not below.isdisjoint(devices):
            found.append(FileSystem(tuple(same), below))
    return found + [FileSystem((), frozenset({device})) for device in sorted(unseen)]


def in_freezing_order(
    systems: Iterable[FileSystem], beneath: stack.Beneath, storages: Iterable[DeviceNumber] = ()
) -> list[FileSystem]:
    """The same file systems, each before what it rests on, those that hold difference storage (`st_dev`) last.

    Writing one back makes the devices beneath it write, and copies of that into difference storage: nothing of that may
    be frozen yet. Raises Unsupported for a circle.
    """
    systems = list(systems)
    holding = frozenset(storages)
    earlier: dict[FileSystem, list[FileSystem]] = {system: [] for system in systems}
    for upper in systems:
        below = stack.all_beneath(upper.devices, beneath)
        for lower in systems:
            stores = lower.number in holding and upper.number not in holding
            if stores or not below.isdisjoint(lower.devices):
                earlier[lower].append(upper)
    try:
        return list(graphlib.TopologicalSorter(earlier).static_order())
    except graphlib.CycleError as error:
        circle: list[FileSystem] = error.args[1]
        points = " -> ".join(system.point for system in circle)
        text = f"these file systems rest on one another in a circle and cannot be frozen one by one: {points}"
        raise Unsupported(text, advice="use --no-freeze") from None
