# SPDX-License-Identifier: MIT
"""What a daemon that has died, a reboot or an origin that went away can leave behind: one finding for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blksnap_ublk.forms import Finding, FindingState
from blksnap_ublk.host.mounts import Mount

_SHOWN = 5


@dataclass(frozen=True)
class UnknownDisk:
    """A ublk device of ours, `/dev/ublkbN`, of which nothing is known any more; `users`: who has it open, in words."""

    path: str
    users: Sequence[str] = ()


@dataclass(frozen=True)
class LeftOvers:
    """What was found, in the words of the daemon.

    `disks`: ublk devices of this daemon that nobody serves and nobody knows. `foreign_disks`: those of a daemon with
    another runtime directory that nobody serves. `runtimes`: other runtime directories with state and without a
    daemon. `lost_snapshots`: ids of snapshots that are held and cannot be trusted. `pinned_files`: immutable files
    that are storage of nothing. `saved_changes`: files with the change maps of origins that are not here.
    """

    disks: Sequence[UnknownDisk] = ()
    foreign_disks: Sequence[str] = ()
    runtimes: Sequence[Path] = ()
    lost_snapshots: Sequence[str] = ()
    pinned_files: Sequence[str] = ()
    saved_changes: Sequence[Path] = ()
    problems: Sequence[str] = field(default=())
    """What could not be looked at, and why."""


def left_over_findings(found: LeftOvers) -> list[Finding]:
    """One for each kind."""
    return [
        _disks(found.disks),
        _other_daemons(found.foreign_disks, found.runtimes),
        _snapshots(found.lost_snapshots),
        _files(found.pinned_files),
        _saved(found.saved_changes),
        *(Finding(name="left-over", state=FindingState.WARN, text=text, advice=None) for text in found.problems),
    ]


def state_mounts(mounts: Sequence[Mount]) -> list[Path]:
    """The runtime directories in which a tmpfs with the state of a daemon is mounted, running or not."""
    found = {Path(mount.point) for mount in mounts if mount.filesystem == "tmpfs"}
    return sorted(path.parent for path in found if path.name == "state" and (path / "catalogue").is_dir())


def _disks(disks: Sequence[UnknownDisk]) -> Finding:
    if not disks:
        return _ok("left-over", "no device is left without a server")
    used = [disk for disk in disks if disk.users]
    shown = _list([f"{disk.path} (used by {', '.join(disk.users)})" if disk.users else disk.path for disk in disks])
    advice = "blksnap-ublk doctor --fix deletes what nobody uses"
    if used:
        advice = f"end what uses {_list([disk.path for disk in used])}, their requests wait for ever; then {advice}"
    return _warn("left-over", f"not served, and nothing is known of what it showed: {shown}", advice)


def _other_daemons(disks: Sequence[str], runtimes: Sequence[Path]) -> Finding:
    if not disks and not runtimes:
        return _ok("other-daemons", "no other daemon has left anything")
    starts = [f"BLKSNAP_UBLK_RUN={path} blksnap-ublk serve" for path in runtimes]
    said = []
    if disks:
        said.append(f"{_list(disks)} not served, of a daemon with another runtime directory")
    if runtimes:
        said.append(f"state of a daemon that does not run in {_list(runtimes)}")
    advice = "start it with its BLKSNAP_UBLK_RUN, it recovers them"
    if starts:
        advice = f"recover its devices: {_list(starts)}"
    return _warn("other-daemons", "; ".join(said), advice)


def _snapshots(ids: Sequence[str]) -> Finding:
    if not ids:
        return _ok("snapshots", "none is held in vain")
    advice = f"`snapshot check` says why; give their storage back: blksnap-ublk snapshot destroy {' '.join(ids)}"
    return _warn("snapshots", f"held, and cannot be trusted: {_list(ids)}", advice)


def _files(paths: Sequence[str]) -> Finding:
    if not paths:
        return _ok("storage-files", "none is left immutable")
    advice = "blksnap-ublk doctor --fix, or chattr -i them; they are yours to remove then"
    return _warn("storage-files", f"immutable, and storage of nothing any more: {_list(paths)}", advice)


def _saved(paths: Sequence[Path]) -> Finding:
    if not paths:
        return _ok("saved-changes", "every saved change map has its origin")
    text = f"{len(paths)} change maps of origins that are not here: {_list(paths)}"
    advice = "they are used when their origins come back; remove those of origins that never do"
    return Finding(name="saved-changes", state=FindingState.OK, text=text, advice=advice)


def _list(things: Sequence[object]) -> str:
    shown = ", ".join(str(thing) for thing in things[:_SHOWN])
    return shown if len(things) <= _SHOWN else f"{shown} and {len(things) - _SHOWN} more"


def _ok(name: str, text: str) -> Finding:
    return Finding(name=name, state=FindingState.OK, text=text, advice=None)


def _warn(name: str, text: str, advice: str) -> Finding:
    return Finding(name=name, state=FindingState.WARN, text=text, advice=advice)
