# SPDX-License-Identifier: MIT
"""Difference storage as the host sees it: from SPECs to opened, allocated areas of files and block devices."""

from blksnap_ublk.snapshot.storage.areas import AreaKind, Identity, OpenArea, OpenAreas, Planned, UsedRange
from blksnap_ublk.snapshot.storage.descriptors import DescriptorRegistry
from blksnap_ublk.snapshot.storage.opening import open_storage

__all__ = [
    "AreaKind",
    "DescriptorRegistry",
    "Identity",
    "OpenArea",
    "OpenAreas",
    "Planned",
    "UsedRange",
    "open_storage",
]
