# SPDX-License-Identifier: MIT
"""Who has the nodes of a ublk device: what an error says when a device cannot be stopped, deleted or opened."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.host import blockdev, holders
from blksnap_ublk.ublk.device_info import block_path, char_path

_NAMED = 4


def disk_users(device_id: int) -> list[str]:
    """Mounts, swap, stacked devices and processes that use `/dev/ublkbN` or a partition of it, in words."""
    try:
        number = blockdev.device_number(block_path(device_id))
        users = [holder.text for holder in holders.claims(number)]
        users += [str(opener) for opener in holders.openers(number, ignore={os.getpid()})]
    except BlksnapError:
        return []  # no disk
    return list(dict.fromkeys(users))


def servers(device_id: int) -> list[str]:
    """Processes that have `/dev/ublkcN` open or mapped, in words.

    One that holds it only through a ring (a fixed file) cannot be seen.
    """
    wanted = char_path(device_id)
    return [f"process {pid} ({holders.command_of(pid)})" for pid in _pids() if wanted in _open_paths(pid)]


def describe(device_id: int) -> str:
    """`in use by mount /data; served by process 12 (python)`, or an empty text when nobody is seen."""
    parts = []
    if users := disk_users(device_id):
        parts.append("in use by " + _some(users))
    if serving := servers(device_id):
        parts.append("served by " + _some(serving))
    return "; ".join(parts)


def _some(texts: list[str]) -> str:
    rest = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + rest


def _pids() -> Iterator[int]:
    return (int(name) for name in sorted(os.listdir("/proc")) if name.isdigit())


def _open_paths(pid: int) -> set[str]:
    found = set()
    for kind in ("fd", "map_files"):
        try:
            names = os.listdir(f"/proc/{pid}/{kind}")
        except OSError:
            continue
        for name in names:
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/{kind}/{name}").removesuffix(" (deleted)"))
    return found
