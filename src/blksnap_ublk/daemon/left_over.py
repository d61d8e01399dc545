# SPDX-License-Identifier: MIT
"""What `doctor` finds left over by a daemon that has died or by a reboot, and what it takes away without asking."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from blksnap_ublk.cbt import HistoryDamaged, saved_file
from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.forms import SnapshotState
from blksnap_ublk.host import pinned_files
from blksnap_ublk.host.identity import identity
from blksnap_ublk.host.left_over import LeftOvers, UnknownDisk, state_mounts
from blksnap_ublk.host.mounts import own_mounts
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.host.pinned_files import PinnedFile
from blksnap_ublk.keeper.processes import read_processes
from blksnap_ublk.keeper.runtime import RuntimePaths
from blksnap_ublk.snapshot import disks, host_view, naming, report
from blksnap_ublk.snapshot.catalogue import Phase
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.saved_changes import Note
from blksnap_ublk.ublk.device_info import DeviceInfo, DeviceState


def look(context: Context, runtime: Path) -> LeftOvers:
    """All that is left over; `runtime` is this daemon's runtime directory."""
    problems: list[str] = []

    def tried(what: str, found: Callable[[], list[str]]) -> list[str]:
        try:
            return found()
        except (OSError, BlksnapError) as error:
            problems.append(f"{what} could not be looked at: {error}")
            return []

    unknown: list[UnknownDisk] = []

    def look_at_disks() -> list[str]:
        unknown.extend(UnknownDisk(info.block_path, disks.users(info.id)) for info in _unknown_disks(context))
        return []

    def foreign() -> list[str]:
        return [info.block_path for info in context.disks.foreign() if info.state is not DeviceState.LIVE]

    tried("ublk devices", look_at_disks)
    return LeftOvers(
        disks=unknown,
        foreign_disks=tried("ublk devices of other daemons", foreign),
        runtimes=[Path(path) for path in tried("mounts", lambda: [str(path) for path in _runtimes(runtime)])],
        lost_snapshots=_lost_snapshots(context),
        pinned_files=[file.path for file in _pinned_files(context)],
        saved_changes=[Path(path) for path in tried("saved change maps", lambda: list(_saved_without_origin(context)))],
        problems=problems,
    )


def take_away(context: Context) -> list[str]:
    """Deletes ublk devices that are unknown and unused, and releases files that are storage of nothing; in words."""
    done = []
    for info in _unknown_disks(context):
        if disks.users(info.id):
            continue
        try:
            if info.state is not DeviceState.DEAD:
                context.disks.stop(info.id)
            context.disks.delete(info.id, in_use=True)
            done.append(f"left-over: deleted {info.block_path}")
        except (OSError, BlksnapError) as error:
            done.append(f"left-over: {info.block_path} not deleted: {error}")
    for file in _pinned_files(context):
        try:
            pinned_files.release(PinnedFile(host_view.find(file.path), file.inode))
            done.append(f"storage-files: {file.path} can be changed again")
        except OSError as error:
            done.append(f"storage-files: {file.path}: {error.strerror or error}")
    return done


def note_pinned_files(context: Context) -> None:
    """To be called when storage has come or gone: so that its immutable files are known after a reboot."""
    if context.saved is not None:
        with suppress(OSError):
            pinned_files.remember(context.saved, list(_pinned_in_use(context)))


def _unknown_disks(context: Context) -> list[DeviceInfo]:
    """Of ours, without a server, and named by no entry of the catalogue; none while something is being made."""
    found = [info for info in context.disks.ours() if info.state is not DeviceState.LIVE]
    devices, snapshots = context.catalogue.devices(), context.catalogue.snapshots()
    if Phase.CREATING in {entry.phase for entry in devices} | {entry.phase for entry in snapshots}:
        return []
    known = {entry.served.ublk_id for entry in devices if entry.served}
    known |= {image.served.ublk_id for entry in snapshots for image in entry.images if image.served}
    return [info for info in found if info.id not in known]


def _runtimes(own: Path) -> Iterator[Path]:
    for path in state_mounts(own_mounts()):
        if path == own:
            continue
        record = read_processes(RuntimePaths(path).processes)
        if not any(record.living(role) for role in record.processes):
            yield path


def _lost_snapshots(context: Context) -> list[str]:
    held = naming.held_snapshots(context.catalogue)
    return [entry.id for entry in held if report.condition(context, entry)[0] is not SnapshotState.ACTIVE]


def _pinned_files(context: Context) -> list[PinnedFile]:
    """Immutable by us, and storage of nothing any more."""
    if context.saved is None:
        return []
    used = set(_pinned_in_use(context))
    noted = [file for file in pinned_files.noted(context.saved) if file not in used]
    return [file for file in noted if pinned_files.is_pinned(PinnedFile(host_view.find(file.path), file.inode))]


def _pinned_in_use(context: Context) -> Iterator[PinnedFile]:
    for storage in context.catalogue.storages():
        for area in [*storage.areas, *storage.announced]:
            # One without a name is gone with its descriptor.
            if area.beneath is not None and os.path.lexists(host_view.find(area.path)):
                yield PinnedFile(area.path, area.inode)


def _saved_without_origin(context: Context) -> Iterator[str]:
    if context.saved is None or not context.saved.is_dir():
        return
    here = _identities()
    for path in sorted(context.saved.glob("*.changes")):
        with suppress(HistoryDamaged, OSError, msgspec.MsgspecError):
            saved = saved_file.read(path)
            if saved is not None and saved.history is not None:
                note = msgspec.json.decode(saved.note, type=Note)
                if note.origin not in here:
                    yield str(path)


def _identities() -> set[str]:
    """Of all block devices."""
    found = set()
    for path in Path("/sys/class/block").iterdir():
        with suppress(OSError, ValueError, BlksnapError):
            major, _, minor = (path / "dev").read_text().strip().partition(":")
            found.add(identity(DeviceNumber(int(major), int(minor))))
    return found
