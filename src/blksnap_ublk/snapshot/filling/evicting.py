# SPDX-License-Identifier: MIT
"""Which snapshot goes when a difference storage is full and its policy is to evict the oldest."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from blksnap_ublk.snapshot.catalogue import Phase, SnapshotEntry


def victim(
    snapshots: Sequence[SnapshotEntry], broken: Collection[str], *, writers_wait: bool, coming: bool = False
) -> SnapshotEntry | None:
    """The snapshot of a storage that is to go next, as long as one that is complete and not broken stays: broken ones
    first, then the oldest; None where none can.

    `snapshots` are all that use the storage, oldest first; `broken` the ids of those that are. While writers wait for
    room only such snapshots can go whose end does not need the writers to come to rest first. `coming`: who could go if
    those that are being taken were complete.
    """
    here = [entry for entry in snapshots if entry.phase is not Phase.DESTROYING]
    healthy = [entry for entry in here if (coming or entry.phase is Phase.ACTIVE) and entry.id not in broken]
    if not healthy:
        return None
    candidates = [entry for entry in here if entry.id in broken] + healthy[:-1]
    for entry in candidates:
        if entry.phase is Phase.ACTIVE and not (writers_wait and _needs_gate(entry, here, broken)):
            return entry
    return None


def _needs_gate(entry: SnapshotEntry, snapshots: Sequence[SnapshotEntry], broken: Collection[str]) -> bool:
    """Whether writes to a device of it must end before it can go: another image of that device is older, and none that
    is not broken is younger.
    """
    position = next(n for n, each in enumerate(snapshots) if each.id == entry.id)
    older = {image.device for each in snapshots[:position] for image in each.images}
    younger = {image.device for each in snapshots[position + 1 :] if each.id not in broken for image in each.images}
    return any(image.device in older and image.device not in younger for image in entry.images)
