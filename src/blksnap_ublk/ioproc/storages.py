# SPDX-License-Identifier: MIT
"""Difference storages with their areas, and the map memory that all images share."""

import errno
import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, field

from blksnap_ublk.engine import ARENA_PORTION, STORAGE_STATE_BYTES, Arena, Storage
from blksnap_ublk.ioproc.devices import expect
from blksnap_ublk.ioproc.messages import AddArea, AddMapMemory, CloseStorage, OpenStorage, SetStorage, StorageReport
from blksnap_ublk.ioproc.shared_files import SharedFile, SharedFiles
from blksnap_ublk.ioproc.state_map import StateMap
from blksnap_ublk.rpc.descriptors import Descriptors

WAIT_LIMIT_MS = 1_000_000_000_000


@dataclass
class DifferenceStorage:
    """A storage; `images` are those that use it. `adopted`: its quarantine has not ended."""

    name: str
    storage: Storage
    state: StateMap
    files: list[SharedFile] = field(default_factory=list)
    records: list[StateMap] = field(default_factory=list)
    images: set[str] = field(default_factory=set)
    adopted: bool = False


def number_of(name: str) -> int:
    """What tells a storage from others where there is no room for its name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Storages:
    """All storages, by name."""

    def __init__(self, files: SharedFiles) -> None:
        self._files = files
        self._storages: dict[str, DifferenceStorage] = {}

    def adopted(self) -> list[DifferenceStorage]:
        """Those whose quarantine has not ended."""
        return [storage for storage in self._storages.values() if storage.adopted]

    def find(self, name: str) -> DifferenceStorage:
        """Raises OSError(ENOENT)."""
        try:
            return self._storages[name]
        except KeyError:
            raise OSError(errno.ENOENT, f"there is no storage {name!r}") from None

    def open(self, message: OpenStorage, descriptors: Descriptors) -> None:
        """Raises OSError; EEXIST for a name that is taken."""
        expect(descriptors, 1, message)
        if message.storage in self._storages:
            raise OSError(errno.EEXIST, f"there is a storage {message.storage!r} already")
        state = StateMap(descriptors[0], STORAGE_STATE_BYTES, "storage state")
        try:
            storage = Storage(state.memory, unit=message.unit, number=number_of(message.storage), adopt=message.adopt)
        except BaseException:
            state.close()
            raise
        self._storages[message.storage] = DifferenceStorage(message.storage, storage, state, adopted=message.adopt)

    def add_area(self, message: AddArea, descriptors: Descriptors) -> None:
        """Raises OSError; EINVAL for an area outside of its file, or smaller than a unit."""
        expect(descriptors, 2, message)
        storage = self.find(message.storage)
        if message.offset < 0 or message.length <= 0:
            raise OSError(errno.EINVAL, f"{message.offset}+{message.length} is no area")
        with ExitStack() as undo:
            shared = self._files.get(descriptors[0], storage=True, held=message.held)
            undo.callback(self._files.put, shared)
            info = shared.file.info
            if message.offset + message.length > info.size:
                text = f"the area {message.offset}+{message.length} lies outside of a file of {info.size} bytes"
                raise OSError(errno.EINVAL, text)
            if message.offset % info.block:
                raise OSError(errno.EINVAL, f"the area begins at {message.offset}, not at a multiple of {info.block}")
            records = StateMap(descriptors[1], storage.storage.records_bytes(message.length), "records")
            undo.callback(records.close)
            storage.storage.add_area(shared.file, message.offset, message.length, records.memory)
            undo.pop_all()
        storage.files.append(shared)
        storage.records.append(records)

    def set(self, message: SetStorage) -> None:
        """Raises OSError(ENOENT), or EINVAL for numbers that mean nothing."""
        for number, limit in ((message.wait_ms, WAIT_LIMIT_MS), (message.low, 1 << 63), (message.rate, 1 << 63)):
            if not 0 <= number < limit:
                raise OSError(errno.EINVAL, f"{number} is out of range")
        storage = self.find(message.storage).storage
        storage.set_rate(message.rate)
        storage.set_room(wait_ms=message.wait_ms, low=message.low)

    def close(self, message: CloseStorage) -> None:
        """Raises OSError; EBUSY while an image uses it."""
        storage = self.find(message.storage)
        if storage.images:
            raise OSError(errno.EBUSY, f"the images {', '.join(sorted(storage.images))} use it")
        storage.storage.close()
        del self._storages[message.storage]
        for memory in (storage.state, *storage.records):
            memory.close()
        for shared in storage.files:
            self._files.put(shared)

    def reports(self) -> list[StorageReport]:
        """All storages, for the inventory."""
        return [
            StorageReport(
                storage=each.name,
                used=each.storage.used,
                capacity=each.storage.capacity,
                areas=[each.storage.area_used(index) for index in range(len(each.files))],
            )
            for each in self._storages.values()
        ]


class MapMemory:
    """The arena; portions are added and never taken away. `adopted`: some hold maps that wait for a sweep."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.portions: list[str] = []
        self.adopted = False
        self._maps: list[StateMap] = []

    def add(self, message: AddMapMemory, descriptors: Descriptors) -> None:
        """Raises OSError; EEXIST for a portion that was added before, EBUSY for one to adopt that comes too late.

        Those added before a failure stay.
        """
        expect(descriptors, len(message.portions), message)
        if len(set(message.portions)) < len(message.portions) or not set(message.portions).isdisjoint(self.portions):
            raise OSError(errno.EEXIST, "a portion is named twice, or was added before")
        with ExitStack() as undo:
            maps = []
            for index, name in enumerate(message.portions):
                memory = StateMap(descriptors[index], ARENA_PORTION, f"portion {name}")
                undo.callback(memory.close)
                if len(memory.memory) != ARENA_PORTION:
                    raise OSError(errno.EINVAL, f"portion {name}: {len(memory.memory)} bytes, not {ARENA_PORTION}")
                maps.append(memory)
            undo.pop_all()
        for position, (name, memory) in enumerate(zip(message.portions, maps, strict=True)):
            try:
                self.arena.add(memory.memory, adopt=message.adopt)
            except BaseException:
                for unused in maps[position:]:
                    unused.close()
                raise
            self.portions.append(name)
            self._maps.append(memory)
            self.adopted |= message.adopt

    def close(self) -> None:
        """When no image is left."""
        self.arena.close()
        for memory in self._maps:
            memory.close()
        self._maps.clear()
