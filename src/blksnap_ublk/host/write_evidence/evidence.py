# SPDX-License-Identifier: MIT
"""What can be read of a device that changes when somebody writes to it.

It proves: between two equal readings no kernel has mounted its ext2, ext3, ext4, XFS or btrfs file system for writing,
and no tool that keeps to the rules of that file system (fsck that repairs, tune2fs, resize, label) has changed it.
Within one boot, where the kernel counts writes, it proves as well that nothing was written through the node of the
device.

It cannot show writes that go past both. After a reboot, or on another machine: bytes that were written to the raw
device without a word to its file system (`dd` into the blocks of a file, a disk editor), and an xfs_repair that follows
another one without a mount in between. Within a boot: writes to a partition through the node of its disk, to the file
of a loop device past the loop device, or through another path to the same storage.

A device without such a file system shows nothing; nor does one that was not cleanly unmounted, or that is a part of
something else (partitions, LVM, RAID, encryption, swap).
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import time
from collections.abc import Callable

import msgspec

from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.host.write_evidence import btrfs, counters, ext, others, xfs
from blksnap_ublk.host.write_evidence.counters import Counters
from blksnap_ublk.host.write_evidence.found import Found
from blksnap_ublk.host.write_evidence.raw import RawReader

_CLOCK_STEP = 1.5  # seconds that a clock with whole seconds is waited for
_LOOKS: tuple[Callable[[RawReader], Found | None], ...] = (ext.look, xfs.look, btrfs.look)


class Evidence(msgspec.Struct, frozen=True):
    """One reading. `digest` is None where the device shows nothing, for the reason that `objection` gives."""

    filesystem: str | None
    digest: str | None
    objection: str | None
    counters: Counters | None


def read(descriptor: int, number: DeviceNumber) -> Evidence:
    """The evidence on a device that nobody writes to now; `descriptor` may be opened O_DIRECT.

    A file system whose last write was in this very second is read again in the next: a later write shows then. Raises
    OSError, NotFound.
    """
    counted = counters.read(number)
    found = _look(descriptor)
    if counted is None and found.written is not None and 0 <= time.time() - found.written < 1:
        time.sleep(min(math.floor(time.time()) + 1 - time.time(), _CLOCK_STEP))
    digest = None if found.content is None else hashlib.sha256(found.content).hexdigest()
    return Evidence(found.kind or None, digest, found.objection, counted)


def refutation(before: Evidence, now: Evidence) -> str | None:
    """Why two readings do not prove that nobody has written in between; None where they do."""
    if before.digest is None:
        return before.objection or "nothing on it shows when it was written to"
    if (before.filesystem, before.digest) != (now.filesystem, now.digest):
        return "its file system was written to meanwhile"
    then, later = before.counters, now.counters
    if then is not None and later is not None and then.comparable(later) and then.written != later.written:
        return "it was written to meanwhile"
    return None


def _look(descriptor: int) -> Found:
    device = RawReader(descriptor)
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if (use := others.use_of(device, size)) is not None:
        return Found("", None, f"it is {use}")
    found = []
    for look in _LOOKS:
        try:
            found.append(look(device))
        except OSError as error:
            if error.errno != errno.ENXIO:  # the device ends before the place where it would be
                raise
    systems = [each for each in found if each is not None]
    if len(systems) == 1:
        return systems[0]
    return Found("", None, "nothing on it shows when it was written to" if not systems else "it has two file systems")
