# SPDX-License-Identifier: MIT
"""Which device or snapshot a user means, and what the files that belong to one are called."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from blksnap_ublk.errors import NotFound, UsageError
from blksnap_ublk.snapshot.catalogue import Catalogue, DeviceEntry, ImageEntry, Phase, SnapshotEntry

IMAGE_PREFIX = "image-"
_PREFIX = re.compile(r"[0-9a-f-]{4,36}")


def block_path(entry: DeviceEntry) -> str:
    """The filtered device of a device that has one."""
    assert entry.served is not None
    return f"/dev/ublkb{entry.served.ublk_id}"


def cursor(image: ImageEntry) -> str:
    """What a backup of the image remembers."""
    return f"{image.generation}:{image.change_number}"


def only_device(entry: SnapshotEntry) -> str | None:
    """The filtered device of a snapshot of one; None for one of several."""
    return entry.images[0].filtered if len(entry.images) == 1 else None


def image_state_name(image: ImageEntry) -> str:
    """The state file of an image."""
    return f"{IMAGE_PREFIX}{image.key}"


def is_image_state(name: str) -> bool:
    """Whether a state file of that name is that of an image."""
    return name.startswith(IMAGE_PREFIX)


def commit_name(snapshot_id: str) -> str:
    """The state file whose first word says that the instant of a snapshot came."""
    return f"commit-{snapshot_id}"


def storage_state_name(key: str) -> str:
    """The state file of a storage."""
    return f"storage-{key}"


def records_name(key: str, n: int | None) -> str:
    """The records file of area `n` of a storage; with None what the names of all begin with."""
    return f"records-{key}." + ("" if n is None else str(n))


def storage_descriptor_name(key: str, n: int | None) -> str:
    """The same for what the keeper holds."""
    return f"storage:{key}:" + ("" if n is None else str(n))


def origin_descriptor_name(key: str) -> str:
    """The name under which the keeper holds the origin of a device."""
    return f"origin:{key}"


def served_devices(catalogue: Catalogue) -> list[DeviceEntry]:
    """The devices that users can name, by id."""
    found = [entry for entry in catalogue.devices() if entry.phase is not Phase.CREATING and entry.served is not None]
    return sorted(found, key=lambda entry: entry.served.ublk_id if entry.served else -1)


def held_snapshots(catalogue: Catalogue) -> list[SnapshotEntry]:
    """The snapshots that users can name, oldest first."""
    return [entry for entry in catalogue.snapshots() if entry.phase is not Phase.CREATING]


def find_device(catalogue: Catalogue, text: str) -> DeviceEntry:
    """The device of an origin path, a filtered device path, a symlink to either, or a name. Raises NotFound."""
    devices = served_devices(catalogue)
    if "/" not in text:
        found = next((entry for entry in devices if entry.name == text), None)
    else:
        real = os.path.realpath(text)
        found = next(
            (entry for entry in devices if real in (entry.origin, block_path(entry)) or text == entry.origin), None
        )
        found = found or _by_number(devices, text)
    if found is None:
        raise NotFound("no such filtered device", subject=text, advice="`blksnap-ublk list` shows what is attached")
    return found


def find_snapshot(catalogue: Catalogue, text: str) -> SnapshotEntry:
    """The snapshot of a UUID, or of a prefix of 4 characters or more of one only. Raises NotFound, UsageError."""
    prefix = text.lower()
    if not _PREFIX.fullmatch(prefix):
        raise UsageError("not the UUID of a snapshot, nor at least 4 characters of one", subject=text or "''")
    found = [entry for entry in held_snapshots(catalogue) if entry.id.startswith(prefix)]
    if not found:
        raise NotFound("no such snapshot", subject=text, advice="`blksnap-ublk snapshot list` shows what is held")
    if len(found) > 1:
        raise UsageError(f"{len(found)} snapshots begin like this", subject=text, advice="give more characters")
    return found[0]


def snapshots_of(catalogue: Catalogue, device: str) -> list[SnapshotEntry]:
    """All snapshots with an image of the device of that key, oldest first."""
    return [entry for entry in catalogue.snapshots() if any(image.device == device for image in entry.images)]


def snapshots_in(catalogue: Catalogue, storage: str) -> list[SnapshotEntry]:
    """All snapshots whose old data is kept in the storage of that key, oldest first."""
    return [entry for entry in catalogue.snapshots() if entry.storage_key == storage]


def _by_number(devices: Sequence[DeviceEntry], path: str) -> DeviceEntry | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    number = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return next((entry for entry in devices if entry.number == number), None)
