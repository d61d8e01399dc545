# SPDX-License-Identifier: MIT
"""The journal of a mounted ext4 that lies on a device of its own."""

from __future__ import annotations

from pathlib import Path

from blksnap_ublk.errors import NotFound
from blksnap_ublk.host import sysfs
from blksnap_ublk.host.number import DeviceNumber

_EXT4 = Path("/sys/fs/ext4")
_BLOCK = Path("/sys/class/block")
_THREAD = "jbd2/"


def external(number: DeviceNumber) -> frozenset[DeviceNumber]:
    """The device with the journal of the ext4 that is mounted from a device; empty where there is none.

    The kernel names the thread that writes the journal after its device, and after its inode where it is a file of the
    file system: `jbd2/sdb1`, `jbd2/sda1-8`. So nothing needs to be read from the device, which may not answer.
    """
    try:
        name = sysfs.directory(number).name
        thread = int((_EXT4 / name / "journal_task").read_text())
        title = Path(f"/proc/{thread}/comm").read_text().rstrip("\n")
    except (OSError, ValueError, NotFound):
        return frozenset()
    node = _BLOCK / title.removeprefix(_THREAD)
    if not title.startswith(_THREAD) or node.name == name:
        return frozenset()
    try:
        return frozenset({DeviceNumber.parse((node / "dev").read_text())})
    except (OSError, ValueError):
        return frozenset()
